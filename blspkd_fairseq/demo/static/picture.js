// The spectrogram, CIF's weights with the boundaries of tokens, and a button for each token, on one axis of time.

import { play } from "./sound.js";

const PIXELS_PER_SECOND = 170;
const MAGMA = [[0, 0, 4], [59, 15, 112], [140, 41, 129], [222, 73, 104], [254, 159, 109], [252, 253, 191]];

export function draw(figure, heard, buffer) {
  const seconds = heard.seconds;
  const strip = figure.querySelector(".strip");
  strip.style.width = `${Math.round(seconds * PIXELS_PER_SECOND)}px`;
  figure.hidden = false;
  const count = heard.tokens.length;
  figure.querySelector("figcaption").textContent = count
    ? `${seconds.toFixed(1)} s, cut into ${count} tokens by CIF in ${heard.milliseconds} ms. Choose a token to hear it.`
    : `${seconds.toFixed(1)} s.`;
  figure.querySelector(".scroll").setAttribute("aria-label", "Speech over time, scrolls sideways");
  drawMel(figure.querySelector(".mel"), heard);
  const cif = figure.querySelector(".cif");
  cif.hidden = !heard.weights;
  if (heard.weights) drawWeights(cif, heard);
  addTokens(figure, heard, buffer);
  addEdges(figure.querySelector(".edges"), heard);
  addAxis(figure.querySelector(".axis"), seconds);
}

function drawMel(canvas, { mel, frames, bins, seconds }) {
  const bytes = Uint8Array.from(atob(mel), (letter) => letter.charCodeAt(0));
  canvas.width = frames;
  canvas.height = bins;
  const context = canvas.getContext("2d");
  const image = context.createImageData(frames, bins);
  for (let x = 0; x < frames; x++) {
    for (let y = 0; y < bins; y++) {
      image.data.set([...color(bytes[x * bins + y] / 255), 255], 4 * ((bins - 1 - y) * frames + x));
    }
  }
  context.putImageData(image, 0, 0);
  canvas.setAttribute("aria-label", `Spectrogram of ${seconds.toFixed(1)} seconds, as the speech encoder sees it`);
}

function color(value) {
  const place = value * (MAGMA.length - 1);
  const index = Math.min(MAGMA.length - 2, Math.floor(place));
  return MAGMA[index].map((low, i) => low + (MAGMA[index + 1][i] - low) * (place - index));
}

function drawWeights(canvas, { weights }) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * scale;
  canvas.height = canvas.clientHeight * scale;
  const context = canvas.getContext("2d");
  const highest = Math.max(0.2, ...weights);
  const step = canvas.width / weights.length;
  context.fillStyle = "#f08a24";
  weights.forEach((weight, i) => {
    const height = (weight / highest) * (canvas.height - 2);
    context.fillRect(i * step, canvas.height - height, Math.ceil(step), height);
  });
  canvas.setAttribute("aria-label", `CIF's weight of each of ${weights.length} frames; a token ends at each line`);
}

function addTokens(figure, heard, buffer) {
  const bar = figure.querySelector(".tokens");
  bar.hidden = !heard.tokens.length;
  const buttons = heard.tokens.map((token, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = token.text.trim() || "␣";
    button.style.left = `${(100 * token.start) / heard.seconds}%`;
    button.style.width = `${(100 * (token.end - token.start)) / heard.seconds}%`;
    button.title = `${token.start.toFixed(2)} to ${token.end.toFixed(2)} s`;
    button.setAttribute("aria-label", `${token.text.trim() || "space"}, ${button.title}`);
    button.tabIndex = index ? -1 : 0;
    button.addEventListener("click", () => playToken(figure, button, token, heard.seconds, buffer));
    return button;
  });
  bar.replaceChildren(...buttons);
  bar.addEventListener("keydown", (event) => move(event, buttons));
}

// One stop of the Tab key for all tokens; arrows go from one to the next.
function move(event, buttons) {
  const from = buttons.indexOf(document.activeElement);
  const to = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (to === undefined || !buttons[to]) return;
  event.preventDefault();
  buttons[from].tabIndex = -1;
  buttons[to].tabIndex = 0;
  buttons[to].focus();
}

async function playToken(figure, button, token, seconds, buffer) {
  const cursor = figure.querySelector(".cursor");
  cursor.style.left = `${(100 * token.start) / seconds}%`;
  cursor.hidden = false;
  button.classList.add("playing");
  await play(buffer, token.start, token.end);
  button.classList.remove("playing");
  cursor.hidden = true;
}

// A line where each token ends, over both pictures.
function addEdges(layer, { tokens, seconds }) {
  const lines = tokens.map((token) => {
    const line = document.createElement("span");
    line.style.left = `${(100 * token.end) / seconds}%`;
    return line;
  });
  layer.replaceChildren(...lines);
}

function addAxis(axis, seconds) {
  const marks = [];
  for (let second = 0; second <= seconds; second++) {
    const mark = document.createElement("span");
    mark.textContent = second ? `${second}` : "0 s";
    mark.style.left = `${(100 * second) / seconds}%`;
    marks.push(mark);
  }
  axis.replaceChildren(...marks);
}
