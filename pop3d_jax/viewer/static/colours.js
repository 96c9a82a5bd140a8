// Colours of voxels: red, green, blue from 0 to 255, three bytes a voxel.
import { valueOf } from "viewer/data.js";

// From the grey of what does not match to the red of what does; the same as in the pictures of `query`.
const SIMILARITY = ["#d9dde3", "#c9ced6", "#f4d58d", "#f08a24", "#c1121f", "#780000"];
// Viridis, from low to high.
const HEIGHT = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"];

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function ramp(stops, share) {
  const colours = stops.map(rgb);
  const place = Math.min(Math.max(share, 0), 1) * (colours.length - 1);
  const index = Math.min(Math.floor(place), colours.length - 2);
  return colours[index].map((value, channel) => value + (place - index) * (colours[index + 1][channel] - value));
}

function table(stops) {
  return Array.from({ length: 256 }, (_, i) => ramp(stops, i / 255));
}

const SIMILARITY_TABLE = table(SIMILARITY);
const HEIGHT_TABLE = table(HEIGHT);

export function gradient(mode) {
  return `linear-gradient(to right, ${(mode === "height" ? HEIGHT : SIMILARITY).join(", ")})`;
}

// Colours of a frame's voxels in one of the modes "class", "similarity", "height", "features".
export function coloursOf(mode, data, frame, phrase, similarity) {
  if (mode === "features") return frame.principal;
  const colours = new Uint8Array(frame.count * 3);
  const { minimum, maximum } = data.volume;
  for (let i = 0; i < frame.count; i++) {
    let colour;
    if (mode === "class") {
      colour = data.classes[frame.classes[i]].colour;
    } else if (mode === "height") {
      const share = (frame.centres[3 * i + 2] - minimum[2]) / (maximum[2] - minimum[2]);
      colour = HEIGHT_TABLE[Math.round(255 * share)];
    } else {
      const span = Math.max(phrase.colour_high - phrase.colour_low, 1e-6);
      const share = (valueOf(similarity[i], phrase) - phrase.colour_low) / span;
      colour = SIMILARITY_TABLE[Math.round(255 * Math.min(Math.max(share, 0), 1))];
    }
    colours.set(colour, 3 * i);
  }
  return colours;
}
