// Wires the controls of the page to the voxels and the images. All text reaches the page as text, never as markup.
import { coloursOf, gradient } from "viewer/colours.js";
import { bestVoxels, SceneData, valueOf } from "viewer/data.js";
import { ImageStrip } from "viewer/images.js";
import { VoxelView } from "viewer/voxels.js";

const HITS_RINGED = 25;
const HITS_LISTED = 8;
const at = (id) => document.getElementById(id);

const data = new SceneData(JSON.parse(at("scene-data").textContent));
const view = newView();
const images = new ImageStrip(at("images"), data.cameras);
const state = { number: data.first, mode: "class", phrase: data.phrases[0], hits: [], selected: -1, dark: false };

// Nothing of the page works without the view, so it says why there is none.
function newView() {
  try {
    return new VoxelView(at("voxels"), data.volume);
  } catch (error) {
    const wayOut = "switch on hardware acceleration, or open it in another browser";
    const words = `This page draws with WebGL 2, which this browser does not offer (${error.message}): ${wayOut}.`;
    at("voxels").replaceWith(element("p", words, "no-view"));
    throw error;
  }
}

const frame = () => data.frame(state.number);
const similarity = () => state.phrase && data.similarity(state.phrase, state.number);

function showFrame(number) {
  state.number = number;
  state.selected = -1;
  hideTip();
  view.showFrame(frame());
  images.showFrame(frame());
  const seconds = (data.frames[number].timestamp - data.frames[0].timestamp) / 1e6;
  at("time").value = number;
  at("when").textContent = `${number + 1} of ${data.frames.length}, ${seconds.toFixed(1)} s`;
  at("token").textContent = data.frames[number].sample_token;
  refresh();
}

function refresh() {
  const current = frame();
  view.setColours(coloursOf(state.mode, data, current, state.phrase, similarity()));
  state.hits = state.phrase ? bestVoxels(similarity(), HITS_RINGED) : [];
  showLegend(current);
  showAnswer(current, state.hits);
  showSelected();
  at("count").textContent = `${current.count.toLocaleString("en")} voxels`;
}

function showSelected() {
  view.mark(state.selected);
  images.mark(state.hits, state.selected);
  at("details").replaceChildren(...(state.selected < 0 ? [] : description(frame(), state.selected)));
}

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function swatch(colour) {
  const made = element("span", "", "swatch");
  made.style.background = `rgb(${colour.join(",")})`;
  return made;
}

function showLegend(current) {
  const legend = at("legend");
  if (state.mode === "class") {
    const counts = new Map();
    for (const index of current.classes) counts.set(index, (counts.get(index) ?? 0) + 1);
    const sorted = [...counts].sort((a, b) => b[1] - a[1]);
    legend.replaceChildren(
      ...sorted.map(([index, count]) => {
        const row = element("div", "", "row");
        row.append(swatch(data.classes[index].colour), element("span", data.classes[index].name));
        row.append(element("span", count.toLocaleString("en"), "number"));
        return row;
      }),
    );
  } else if (state.mode === "features") {
    legend.replaceChildren(
      element("p", "Red, green and blue are the three main directions in which the features differ: like colours, like features."),
    );
  } else {
    const { minimum, maximum } = data.volume;
    const ends =
      state.mode === "height"
        ? [`${minimum[2].toFixed(1)} m`, `${maximum[2].toFixed(1)} m`]
        : [state.phrase.colour_low.toFixed(3), state.phrase.colour_high.toFixed(3)];
    const bar = element("div", "", "bar");
    bar.style.background = gradient(state.mode, data);
    const row = element("div", "", "row spread");
    row.append(...ends.map((end) => element("span", end)));
    const what = state.mode === "height" ? "height over the lidar" : `similarity with “${state.phrase.text}” (cosine)`;
    legend.replaceChildren(bar, row, element("p", what));
  }
  if (current.count < current.stored_voxels) {
    const [shown, stored] = [current.count, current.stored_voxels].map((number) => number.toLocaleString("en"));
    legend.append(element("p", `${shown} of ${stored} voxels shown, the most probable (--max_voxels).`, "left-out"));
  }
}

function showAnswer(current, hits) {
  const answer = at("answer");
  if (!state.phrase) {
    answer.replaceChildren();
    return;
  }
  const verdict = state.phrase.verdicts[state.number];
  const words = `“${state.phrase.text}”`;
  let text = `${words}: no background phrase to compare with.`;
  if (verdict.margin !== null) {
    // The lead over the nearest background phrase, where it is largest; the threshold decides, 0 unless it was given.
    const lead = `${verdict.margin >= 0 ? "+" : ""}${verdict.margin.toFixed(3)}`;
    const limit = state.phrase.threshold ? `, threshold ${state.phrase.threshold}` : "";
    text = verdict.present
      ? `${words} seems to be here: its best lead over the background phrases is ${lead}${limit}.`
      : `Perhaps there is no ${words} here: its best lead over “${verdict.rival}” is ${lead}${limit}.`;
  }
  if (!current.count) text = "There is no voxel in this key frame.";
  const list = element("ol", "", "hits");
  for (const voxel of hits.slice(0, HITS_LISTED)) {
    const button = element("button", oneLine(current, voxel));
    button.addEventListener("click", () => {
      select(voxel);
      view.lookAt(voxel);
    });
    const item = element("li", "");
    item.append(button);
    list.append(item);
  }
  answer.replaceChildren(element("p", text, verdict.present ? "present" : "absent"), list);
}

function metres(current, voxel) {
  const [x, y, z] = current.centres.subarray(3 * voxel, 3 * voxel + 3);
  const side = `${Math.abs(x).toFixed(1)} m ${x >= 0 ? "right" : "left"}`;
  const ahead = `${Math.abs(y).toFixed(1)} m ${y >= 0 ? "ahead" : "behind"}`;
  return { x, y, z, words: `${side}, ${ahead}` };
}

function oneLine(current, voxel) {
  const score = valueOf(similarity()[voxel], state.phrase);
  return `${score.toFixed(3)}  ${data.classes[current.classes[voxel]].name}, ${metres(current, voxel).words}`;
}

// Name and value of everything that is known of a voxel.
function description(current, voxel) {
  const place = metres(current, voxel);
  const m = current.lidar_to_global;
  const world = [0, 4].map((row) => m[row] * place.x + m[row + 1] * place.y + m[row + 2] * place.z + m[row + 3]);
  const facts = [
    ["class", data.classes[current.classes[voxel]].name],
    ["class score", valueOf(current.classScores[voxel], data.class_score).toFixed(3)],
    ...(state.phrase ? [[`“${state.phrase.text}”`, valueOf(similarity()[voxel], state.phrase).toFixed(3)]] : []),
    ["occupied", `${((100 * current.occupancy[voxel]) / 255).toFixed(0)} %`],
    ["where", `${place.words}, ${place.z.toFixed(1)} m up`],
    ["distance", `${Math.hypot(place.x, place.y, place.z).toFixed(1)} m`],
    ["global x, y", world.map((value) => value.toFixed(1)).join(", ")],
    ["voxel", current.coordinates.subarray(3 * voxel, 3 * voxel + 3).join(", ")],
  ];
  return facts.flatMap(([name, value]) => [element("dt", name), element("dd", value)]);
}

function select(voxel) {
  state.selected = voxel;
  showSelected();
}

function setMode(mode) {
  state.mode = mode;
  at("mode").value = mode;
  refresh();
}

function choosePhrase(phrase) {
  questions++; // answers that are still to come are no longer waited for
  state.phrase = phrase;
  at("phrase").value = phrase.text;
  at("message").textContent = "";
  setMode("similarity");
}

// Answers may come in another order than their questions: only the last question's is shown.
let questions = 0;

async function ask(text) {
  const known = data.phrase(text);
  if (known) {
    choosePhrase(known);
    return;
  }
  if (!data.live) {
    at("message").textContent =
      `This page knows ${data.phrases.length} phrases, listed below the field. For free text: python -m pop3d_jax.view --serve`;
    return;
  }
  const question = ++questions;
  at("message").textContent = "asking the text tower …";
  try {
    const answer = await fetch(`similarity?text=${encodeURIComponent(text)}`);
    if (!answer.ok) throw new Error(await answer.text());
    const phrase = await answer.json();
    if (!data.phrase(phrase.text)) {
      data.phrases.push(phrase);
      listPhrases();
    }
    if (question === questions) choosePhrase(data.phrase(phrase.text));
  } catch (error) {
    if (question === questions) at("message").textContent = `No answer: ${error.message}`;
  }
}

function listPhrases() {
  at("phrases").replaceChildren(
    ...data.phrases.map((phrase) => {
      const chip = element("button", phrase.text, "chip");
      chip.type = "button";
      chip.addEventListener("click", () => choosePhrase(phrase));
      return chip;
    }),
  );
}

function setTheme(dark) {
  state.dark = dark;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  at("theme").textContent = dark ? "light" : "dark";
  view.setTheme(dark);
}

// A click that turned the view is no choice of a voxel.
const CLICK_PIXELS = 4;
let pressed = null;
let hovered = null;
at("voxels").addEventListener("pointerdown", (event) => (pressed = [event.clientX, event.clientY]));
at("voxels").addEventListener("pointerup", (event) => {
  const moved = pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]);
  pressed = null;
  if (moved !== null && moved <= CLICK_PIXELS) select(view.pick(event.clientX, event.clientY));
});
at("voxels").addEventListener("pointermove", (event) => {
  if (event.buttons) {
    hideTip();
    return;
  }
  if (!hovered) requestAnimationFrame(showTip);
  hovered = { x: event.clientX, y: event.clientY };
});
at("voxels").addEventListener("pointerleave", hideTip);
at("voxels").addEventListener("wheel", hideTip, { passive: true });

// What is under the mouse changes with the view and with the key frame.
function hideTip() {
  hovered = null;
  at("tip").hidden = true;
}

function showTip() {
  if (!hovered) return;
  const voxel = view.pick(hovered.x, hovered.y);
  const tip = at("tip");
  tip.hidden = voxel < 0;
  if (voxel >= 0) {
    const current = frame();
    const name = data.classes[current.classes[voxel]].name;
    const lines = [`${name} ${valueOf(current.classScores[voxel], data.class_score).toFixed(3)}`];
    if (state.phrase) lines.push(`“${state.phrase.text}” ${valueOf(similarity()[voxel], state.phrase).toFixed(3)}`);
    lines.push(metres(current, voxel).words);
    tip.replaceChildren(...lines.map((line) => element("div", line)));
    const room = view.canvas.getBoundingClientRect();
    tip.style.left = `${Math.min(hovered.x - room.left + 14, room.width - tip.offsetWidth - 4)}px`;
    tip.style.top = `${Math.min(hovered.y - room.top + 14, room.height - tip.offsetHeight - 4)}px`;
  }
  hovered = null;
}

at("mode").addEventListener("change", (event) => setMode(event.target.value));
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("phrase").value.trim();
  if (text) ask(text);
});
at("time").max = data.frames.length - 1;
at("time").addEventListener("input", (event) => showFrame(Number(event.target.value)));
at("show-lidar").addEventListener("change", (event) => view.showLidar(event.target.checked));
at("show-voxels").addEventListener("change", (event) => view.showVoxels(event.target.checked));
at("reset").addEventListener("click", () => view.resetCamera());
at("theme").addEventListener("click", () => setTheme(!state.dark));
at("screenshot").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = view.screenshot();
  link.download = `${data.frames[state.number].sample_token}.png`;
  link.click();
});

at("title").textContent = data.title;
document.title = `${data.title}: voxels`;
at("ask").hidden = !data.phrases.length && !data.live;
for (const option of at("mode").options) option.disabled = option.value === "similarity" && !data.phrases.length;
listPhrases();
setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches);
showFrame(state.number);
// For the console and for tests: what is shown.
window.sceneView = { data, state, view, select, showFrame };
