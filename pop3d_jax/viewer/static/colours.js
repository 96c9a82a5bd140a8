// Colours of voxels: red, green, blue from 0 to 255, three bytes a voxel.
import { valueOf } from "viewer/data.js";

// Viridis, from low to high.
const HEIGHT = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"];

function stopsOf(mode, data) {
  return mode === "height" ? HEIGHT : data.similarity_colours;
}

// 256 colours from the first stop to the last, three bytes each.
function table(stops) {
  const colours = stops.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Uint8Array.from({ length: 256 * 3 }, (_, k) => {
    const place = (Math.floor(k / 3) / 255) * (colours.length - 1);
    const index = Math.min(Math.floor(place), colours.length - 2);
    const [from, to] = [colours[index][k % 3], colours[index + 1][k % 3]];
    return Math.round(from + (place - index) * (to - from));
  });
}

export function gradient(mode, data) {
  return `linear-gradient(to right, ${stopsOf(mode, data).join(", ")})`;
}

// For each byte of a similarity, its place in the table.
function similarityPlaces(phrase) {
  const span = Math.max(phrase.colour_high - phrase.colour_low, 1e-6);
  return Uint8Array.from({ length: 256 }, (_, byte) => {
    const share = (valueOf(byte, phrase) - phrase.colour_low) / span;
    return Math.round(255 * Math.min(Math.max(share, 0), 1));
  });
}

// Colours of a frame's voxels in one of the modes "class", "similarity", "height", "features".
export function coloursOf(mode, data, frame, phrase, similarity) {
  if (mode === "features") return frame.principal;
  const colours = new Uint8Array(frame.count * 3);
  const { minimum, maximum } = data.volume;
  const palette =
    mode === "class" ? Uint8Array.from(data.classes.flatMap(({ colour }) => colour)) : table(stopsOf(mode, data));
  const places = mode === "similarity" ? similarityPlaces(phrase) : null;
  for (let i = 0; i < frame.count; i++) {
    let place;
    if (mode === "class") {
      place = frame.classes[i];
    } else if (mode === "height") {
      place = Math.round((255 * (frame.centres[3 * i + 2] - minimum[2])) / (maximum[2] - minimum[2]));
    } else {
      place = places[similarity[i]];
    }
    for (let channel = 0; channel < 3; channel++) colours[3 * i + channel] = palette[3 * place + channel];
  }
  return colours;
}
