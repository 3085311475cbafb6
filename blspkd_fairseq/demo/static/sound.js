// Sound in the browser: recording, decoding, 16 kHz WAV, and playing a part of it.

export const RATE = 16000;

let context = null;

function audioContext() {
  context ??= new AudioContext();
  context.resume();
  return context;
}

export class Recording {
  static async start() {
    if (!navigator.mediaDevices) {
      throw new Error("Browsers give the microphone only to pages of this machine, or over HTTPS.");
    }
    // As it is: what cleans a voice for people takes away what the model was trained on.
    const raw = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    const stream = await navigator.mediaDevices.getUserMedia({ audio: raw });
    const audio = audioContext();
    await audio.audioWorklet.addModule("/static/recorder.js");
    const source = audio.createMediaStreamSource(stream);
    const node = new AudioWorkletNode(audio, "recorder", { numberOfOutputs: 0 });
    const recording = new Recording(stream, source, node, audio.sampleRate);
    node.port.onmessage = (event) => recording.chunks.push(event.data);
    source.connect(node);
    return recording;
  }

  constructor(stream, source, node, rate) {
    Object.assign(this, { stream, source, node, rate, chunks: [] });
  }

  get seconds() {
    return this.chunks.reduce((sum, chunk) => sum + chunk.length, 0) / this.rate;
  }

  async stop() {
    this.source.disconnect();
    this.stream.getTracks().forEach((track) => track.stop());
    const samples = new Float32Array(this.chunks.reduce((sum, chunk) => sum + chunk.length, 0));
    let at = 0;
    for (const chunk of this.chunks) {
      samples.set(chunk, at);
      at += chunk.length;
    }
    if (!samples.length) throw new Error("The microphone gave no sound.");
    const buffer = new AudioBuffer({ length: samples.length, sampleRate: this.rate });
    buffer.copyToChannel(samples, 0);
    return resample(buffer);
  }
}

export async function decodeFile(file) {
  let buffer;
  try {
    buffer = await audioContext().decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is no sound file that this browser can read.`);
  }
  return resample(buffer);
}

// One channel at the rate that the model hears.
async function resample(buffer) {
  const offline = new OfflineAudioContext(1, Math.max(1, Math.ceil(buffer.duration * RATE)), RATE);
  const source = new AudioBufferSourceNode(offline, { buffer });
  source.connect(offline.destination);
  source.start();
  return offline.startRendering();
}

// A 16-bit WAV file of an AudioBuffer with one channel.
export function toWav(buffer) {
  const samples = buffer.getChannelData(0);
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const write = (at, text) => [...text].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, sample)) * 32767, true));
  return new Uint8Array(view.buffer);
}

export function toBase64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

// Plays a part; returns a promise of its end.
export function play(buffer, start, end) {
  const audio = audioContext();
  const source = new AudioBufferSourceNode(audio, { buffer });
  source.connect(audio.destination);
  source.start(0, start, Math.max(0.05, end - start));
  return new Promise((resolve) => {
    source.onended = resolve;
  });
}
