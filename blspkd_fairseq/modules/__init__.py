"""Pure torch building blocks: nothing in this folder imports fairseq."""
