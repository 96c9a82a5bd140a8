// Which faces of voxels can be seen, and which voxel a ray meets first. All in typed arrays.

// Where faces look: axis and sign. Those on top come first: drawn first, they hide most of what lies behind.
export const DIRECTIONS = [[2, 1], [0, -1], [0, 1], [1, -1], [1, 1], [2, -1]];
// The corners of a face by its axis and sign, in voxels from the lower corner, so that its front turns left.
const CORNERS = DIRECTIONS.map(([axis, sign]) => {
  const [u, v] = [(axis + 1) % 3, (axis + 2) % 3];
  const round = [[0, 0], [1, 0], [1, 1], [0, 1]].map(([first, second]) => {
    const corner = [0, 0, 0];
    corner[axis] = sign > 0 ? 1 : 0;
    corner[sign > 0 ? u : v] = first;
    corner[sign > 0 ? v : u] = second;
    return corner;
  });
  return round.flat();
});

export class VoxelGrid {
  constructor(volume) {
    this.minimum = volume.minimum;
    this.voxelSize = volume.voxel_size;
    this.size = volume.voxel_size.map((size, axis) => Math.round((volume.maximum[axis] - volume.minimum[axis]) / size));
    this.strides = [1, this.size[0], this.size[0] * this.size[1]];
    // Number of the voxel in each cell, counted from 1; 0 where there is none.
    this.cells = new Int32Array(this.size[0] * this.size[1] * this.size[2]);
  }

  // Three coordinates a voxel.
  fill(coordinates) {
    this.cells.fill(0);
    this.coordinates = coordinates;
    this.count = coordinates.length / 3;
    const [, row, layer] = this.strides;
    for (let i = 0; i < this.count; i++) {
      this.cells[coordinates[3 * i] + row * coordinates[3 * i + 1] + layer * coordinates[3 * i + 2]] = i + 1;
    }
  }

  // The faces that look at an empty cell or out of the volume, those of one direction after those of another, and within
  // a direction layer by layer, the outermost first: what a camera can see of them is their end (see `visibleFrom`).
  //   voxels: number of each face's voxel; positions: its four corners, metres;
  //   layers: for each direction, the first face of every layer, and one number more, where the direction ends.
  faces() {
    const { coordinates, cells, count, size, strides } = this;
    const layers = DIRECTIONS.map(([axis]) => new Uint32Array(size[axis] + 1));
    const exposed = new Uint8Array(count); // a bit for each direction
    for (let i = 0; i < count; i++) {
      let cell = 0;
      for (let axis = 0; axis < 3; axis++) cell += strides[axis] * coordinates[3 * i + axis];
      for (let d = 0; d < 6; d++) {
        const [axis, sign] = DIRECTIONS[d];
        const place = coordinates[3 * i + axis];
        const beside = place + sign;
        if (beside >= 0 && beside < size[axis] && cells[cell + sign * strides[axis]]) continue;
        exposed[i] |= 1 << d;
        layers[d][sign > 0 ? size[axis] - 1 - place : place]++;
      }
    }
    let total = 0;
    for (const starts of layers) {
      for (let layer = 0; layer < starts.length; layer++) {
        const faces = starts[layer];
        starts[layer] = total;
        total += faces;
      }
    }
    const voxels = new Uint32Array(total);
    const positions = new Float32Array(total * 12);
    const next = layers.map((starts) => starts.slice());
    for (let i = 0; i < count; i++) {
      for (let d = 0; d < 6; d++) {
        if (!(exposed[i] & (1 << d))) continue;
        const [axis, sign] = DIRECTIONS[d];
        const place = coordinates[3 * i + axis];
        const face = next[d][sign > 0 ? size[axis] - 1 - place : place]++;
        voxels[face] = i;
        for (let k = 0; k < 12; k++) {
          const along = k % 3;
          positions[12 * face + k] =
            this.minimum[along] + this.voxelSize[along] * (coordinates[3 * i + along] + CORNERS[d][k]);
        }
      }
    }
    return { voxels, positions, layers };
  }

  // For a direction's layers, the first face whose front a camera at `position` (x, y, z in metres) can see; so it can
  // those after it.
  visibleFrom(layers, direction, position) {
    const [axis, sign] = DIRECTIONS[direction];
    const place = (position[axis] - this.minimum[axis]) / this.voxelSize[axis];
    const layer = sign > 0 ? this.size[axis] + 1 - Math.ceil(place) : Math.floor(place) + 1;
    return layers[direction][Math.min(Math.max(layer, 0), this.size[axis])];
  }

  // The first voxel that a ray enters, or -1. It goes from cell to cell, whatever the number of voxels.
  firstVoxel(origin, direction) {
    const cell = [0, 0, 0];
    const start = [0, 0, 0];
    const speed = [0, 0, 0];
    let enters = 0;
    let leaves = Infinity;
    for (let axis = 0; axis < 3; axis++) {
      start[axis] = (origin[axis] - this.minimum[axis]) / this.voxelSize[axis];
      speed[axis] = direction[axis] / this.voxelSize[axis];
      if (speed[axis] === 0) {
        if (start[axis] < 0 || start[axis] >= this.size[axis]) return -1;
        continue;
      }
      const borders = [-start[axis] / speed[axis], (this.size[axis] - start[axis]) / speed[axis]];
      enters = Math.max(enters, Math.min(...borders));
      leaves = Math.min(leaves, Math.max(...borders));
    }
    if (enters >= leaves) return -1;
    const until = [Infinity, Infinity, Infinity];
    let index = 0;
    for (let axis = 0; axis < 3; axis++) {
      const place = Math.floor(start[axis] + enters * speed[axis]);
      cell[axis] = Math.min(Math.max(place, 0), this.size[axis] - 1);
      index += cell[axis] * this.strides[axis];
      if (speed[axis]) until[axis] = (cell[axis] + (speed[axis] > 0 ? 1 : 0) - start[axis]) / speed[axis];
    }
    // A camera within a voxel looks out of it.
    let entered = enters > 0;
    for (;;) {
      if (entered && this.cells[index]) return this.cells[index] - 1;
      entered = true;
      const axis = until[0] < until[1] ? (until[0] < until[2] ? 0 : 2) : until[1] < until[2] ? 1 : 2;
      const sign = Math.sign(speed[axis]);
      cell[axis] += sign;
      if (cell[axis] < 0 || cell[axis] >= this.size[axis]) return -1;
      index += sign * this.strides[axis];
      until[axis] += Math.abs(1 / speed[axis]);
    }
  }
}
