// The conversation: records or reads a turn, shows the answers of both systems, and remembers what was said.

import * as api from "./api.js";
import { draw } from "./picture.js";
import { Recording, decodeFile, toBase64, toWav } from "./sound.js";

const SLOT = "{speech}";
const find = (id) => document.getElementById(id);

let server = null;
let recording = null;
let hears = []; // messages so far, as the model hears them
let reads = []; // ... as the cascade reads them
let number = 0;
let isBusy = false;

function say(text) {
  find("status").textContent = text;
}

function complain(error) {
  if (error.status === 401) find("key-row").hidden = false;
  find("problem").textContent = error.message;
}

function setBusy(busy) {
  isBusy = busy;
  for (const id of ["record", "file", "clear"]) find(id).disabled = busy;
  find("clear").disabled = busy || !number;
}

async function begin() {
  try {
    server = await api.info();
  } catch (error) {
    return complain(error);
  }
  const compared = server.cascade ? `, beside the cascade: ${server.cascade} writes, the same LLM reads` : "";
  find("about").textContent = `${server.model}${compared}.`;
  find("problem").textContent = "";
}

// ---- a turn ---------------------------------------------------------------------------------------------------

function instruction() {
  const preset = find("preset").value;
  const text = preset === "own" ? find("instruction").value.trim() : preset;
  if (!text) return SLOT;
  return text.includes(SLOT) ? text : `${text}\n${SLOT}`;
}

function turn(prompt, part) {
  const [before, after] = prompt.split(SLOT);
  const texts = [before, after].map((text) => (text ? [{ type: "text", text }] : []));
  return { role: "user", content: [...texts[0], part, ...texts[1]] };
}

async function ask(buffer, name) {
  const prompt = instruction();
  const view = addTurn(buffer, name, prompt);
  setBusy(true);
  find("problem").textContent = "";
  try {
    if (buffer.duration > server.seconds) throw new Error(`Speak for ${server.seconds} s at most.`);
    const wav = toWav(buffer);
    await askHearing(view, wav, prompt);
    say("Looking at what was heard …");
    draw(view.querySelector(".heard"), await api.hear(wav), buffer);
    if (server.cascade) await askCascade(view, wav, prompt);
    say("Ready.");
  } catch (error) {
    complain(error);
    say("");
  }
  view.querySelectorAll("[aria-busy]").forEach((text) => text.setAttribute("aria-busy", "false"));
  setBusy(false);
}

function addTurn(buffer, name, prompt) {
  const view = find("turn").content.firstElementChild.cloneNode(true);
  number += 1;
  const asked = prompt === SLOT ? "" : ` – ${prompt.replace(SLOT, "…")}`;
  view.querySelector("h2").textContent = `${number}. ${name}${asked}`;
  const player = view.querySelector("audio");
  player.src = URL.createObjectURL(new Blob([toWav(buffer)], { type: "audio/wav" }));
  player.setAttribute("aria-label", `What you said in turn ${number}`);
  find("hint").hidden = true;
  find("turns").append(view);
  view.scrollIntoView({ block: "start" });
  return view;
}

async function askHearing(view, wav, prompt) {
  say("Listening …");
  const part = { type: "input_audio", input_audio: { data: toBase64(wav), format: "wav" } };
  const messages = [...hears, turn(prompt, part)];
  const answered = await show(view.querySelector(".hears"), messages, 0);
  hears = [...messages, { role: "assistant", content: answered.text }];
}

async function askCascade(view, wav, prompt) {
  say("The cascade writes and reads …");
  const section = view.querySelector(".reads");
  section.hidden = false;
  const { text, milliseconds } = await api.transcript(wav);
  section.querySelector(".transcript").textContent = `Whisper wrote: ${text || "nothing"}`;
  const messages = [...reads, turn(prompt, { type: "text", text: text || " " })];
  const answered = await show(section, messages, milliseconds);
  reads = [...messages, { role: "assistant", content: answered.text }];
}

// Streams an answer into its place; before: milliseconds that were spent already.
async function show(section, messages, before) {
  const place = section.querySelector(".text");
  const answered = await api.answer(server.model, messages, (text) => {
    place.textContent = text;
  });
  place.textContent = answered.text || "(it says nothing)";
  place.setAttribute("aria-busy", "false");
  const tokens = answered.usage?.completion_tokens ?? 0;
  const written = answered.whole - answered.first;
  // What comes in one piece has no speed: a page that was busy reads all of it at once.
  const rate = tokens > 1 && written > 100 ? `, ${Math.round((1000 * (tokens - 1)) / written)} tokens/s` : "";
  const whole = (before + answered.whole) / 1000;
  section.querySelector(".numbers").textContent =
    `first word after ${Math.round(before + answered.first)} ms, all after ${whole.toFixed(1)} s${rate}`;
  return answered;
}

// ---- what is pressed ------------------------------------------------------------------------------------------

async function toggleRecording() {
  if (isBusy) return;
  if (recording) {
    const finished = recording;
    recording = null;
    find("record").setAttribute("aria-pressed", "false");
    find("record-label").textContent = "Record";
    return ask(await finished.stop(), "You said");
  }
  recording = await Recording.start();
  find("problem").textContent = "";
  find("record").setAttribute("aria-pressed", "true");
  find("record-label").textContent = "Stop and ask";
  say("Recording …");
  tick(recording);
}

function tick(own) {
  if (recording !== own) return;
  find("record-label").textContent = `Stop and ask (${Math.floor(own.seconds)} s)`;
  setTimeout(tick, 500, own);
}

async function takeFile() {
  const [file] = find("file").files;
  find("file").value = "";
  if (file) await ask(await decodeFile(file), file.name);
}

function clear() {
  hears = [];
  reads = [];
  number = 0;
  find("turns").replaceChildren();
  find("hint").hidden = false;
  setBusy(false);
  say("");
}

const guarded = (action) => () => action().catch(complain);
find("record").addEventListener("click", guarded(toggleRecording));
find("file").addEventListener("change", guarded(takeFile));
find("clear").addEventListener("click", clear);
find("ask").addEventListener("submit", (event) => event.preventDefault());
find("preset").addEventListener("change", () => {
  find("instruction").hidden = find("preset").value !== "own";
});
find("key").addEventListener("change", () => {
  api.setKey(find("key").value);
  begin();
});
begin();
