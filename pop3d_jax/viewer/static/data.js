// From the JSON in the page to typed arrays. Arrays are base64 of small integers.

export function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// 0..255 back to the numbers they stand for.
export function valueOf(byte, { low, high }) {
  return low + ((high - low) * byte) / 255;
}

function decodeFrame(frame, volume) {
  const coordinates = bytesOf(frame.coordinates);
  const count = coordinates.length / 3;
  const centres = new Float32Array(coordinates.length);
  for (let i = 0; i < coordinates.length; i++) {
    const axis = i % 3;
    centres[i] = volume.minimum[axis] + volume.voxel_size[axis] * (coordinates[i] + 0.5);
  }
  const lidar = new Int16Array(bytesOf(frame.lidar).buffer);
  return {
    ...frame,
    count,
    coordinates,
    centres,
    occupancy: bytesOf(frame.occupancy),
    classes: bytesOf(frame.class),
    classScores: bytesOf(frame.class_score),
    principal: bytesOf(frame.principal),
    lidar: Float32Array.from(lidar, (centimetres) => centimetres / 100),
  };
}

// Frames are decoded when they are first shown: a scene has forty.
export class SceneData {
  constructor(json) {
    Object.assign(this, json);
    this.decoded = new Map();
    this.similarities = new Map();
  }

  frame(number) {
    if (!this.decoded.has(number)) this.decoded.set(number, decodeFrame(this.frames[number], this.volume));
    return this.decoded.get(number);
  }

  similarity(phrase, number) {
    const key = `${phrase.text}\n${number}`;
    if (!this.similarities.has(key)) this.similarities.set(key, bytesOf(phrase.similarity[number]));
    return this.similarities.get(key);
  }

  phrase(text) {
    return this.phrases.find((phrase) => phrase.text === text);
  }
}

// Voxels in the order of falling similarity, at most `count`.
export function bestVoxels(similarity, count) {
  // Bytes are counted, not sorted: only those that can be among the best are.
  const counts = new Uint32Array(256);
  for (let i = 0; i < similarity.length; i++) counts[similarity[i]]++;
  let least = 255;
  for (let seen = counts[least]; seen < count && least > 0; seen += counts[least]) least--;
  const order = [];
  const room = count - counts.subarray(least + 1).reduce((sum, number) => sum + number, 0);
  for (let i = 0, ties = 0; i < similarity.length; i++) {
    if (similarity[i] > least || (similarity[i] === least && ties++ < room)) order.push(i);
  }
  return order.sort((a, b) => similarity[b] - similarity[a] || a - b);
}
