// The six camera images, with rings where voxels lie in them.

const SVG = "http://www.w3.org/2000/svg";
// As the cameras look around the car: the front row from left to right, the back row as one sees it turning round.
const ORDER = ["front left", "front", "front right", "back right", "back", "back left"];
// A ring's radius in pixels at one metre; rings shrink with distance.
const RING = 110;

// (u, v, depth) of a point in an image, or null where it does not lie in it.
export function projected(image, centres, voxel) {
  const m = image.lidar_to_image;
  const [x, y, z] = centres.subarray(3 * voxel, 3 * voxel + 3);
  const depth = m[8] * x + m[9] * y + m[10] * z + m[11];
  if (depth <= 0) return null;
  const u = (m[0] * x + m[1] * y + m[2] * z + m[3]) / depth;
  const v = (m[4] * x + m[5] * y + m[6] * z + m[7]) / depth;
  return u >= 0 && v >= 0 && u < image.width && v < image.height ? { u, v, depth } : null;
}

export class ImageStrip {
  constructor(parent, cameras) {
    this.cells = ORDER.map((camera) => {
      const figure = document.createElement("figure");
      const image = document.createElement("img");
      image.alt = `camera: ${camera}`;
      const rings = document.createElementNS(SVG, "svg");
      const caption = document.createElement("figcaption");
      caption.textContent = camera;
      figure.append(image, rings, caption);
      parent.append(figure);
      return { index: cameras.indexOf(camera), image, rings };
    });
  }

  showFrame(frame) {
    this.frame = frame;
    for (const { index, image, rings } of this.cells) {
      const { jpeg, width, height } = frame.images[index];
      image.src = `data:image/jpeg;base64,${jpeg}`;
      rings.setAttribute("viewBox", `0 0 ${width} ${height}`);
    }
  }

  // Rings `hits` in red and `selected` (or -1) in blue.
  mark(hits, selected) {
    for (const { index, rings } of this.cells) {
      const image = this.frame.images[index];
      const circles = [];
      for (const voxel of selected < 0 ? hits : [...hits, selected]) {
        const seen = projected(image, this.frame.centres, voxel);
        if (!seen) continue;
        const circle = document.createElementNS(SVG, "circle");
        circle.setAttribute("cx", seen.u);
        circle.setAttribute("cy", seen.v);
        const radius = Math.min(Math.max(RING / seen.depth, 6), 30) * (image.width / 640);
        circle.setAttribute("r", voxel === selected ? radius * 1.5 : radius);
        circle.setAttribute("class", voxel === selected ? "selected" : "hit");
        circles.push(circle);
      }
      rings.replaceChildren(...circles);
    }
  }
}
