// The voxels in three dimensions. Axes are the lidar's: x right, y forward, z up, metres.
import {
  AmbientLight, BoxGeometry, BufferAttribute, BufferGeometry, Color, DirectionalLight, DoubleSide, GridHelper, Mesh,
  MeshLambertMaterial, OrbitControls, PerspectiveCamera, Points, PointsMaterial, Scene, ShaderMaterial, Vector3,
  WebGLRenderer,
} from "three";
import { DIRECTIONS, VoxelGrid } from "viewer/faces.js";

const REST_MILLISECONDS = 200;
const AMBIENT = 1.9;
const SUN = 1.6;
const SUN_POSITION = [-0.4, -0.8, 1.5];
const CAR_SIZE = [1.8, 4.5, 1.5];
// From the lidar on the roof to the middle of the car.
const CAR_CENTRE = [0, 0, -0.95];


// A face has one colour, light included, and a darker border, so that voxels can be told apart: as broad as a share of
// the face, and fainter where that is less than a pixel.
const VERTEX_SHADER = `
  attribute vec4 shade;
  flat varying vec3 colour;
  varying vec2 place;
  void main() {
    int corner = gl_VertexID & 3;
    place = vec2(corner == 1 || corner == 2, corner >= 2);
    colour = shade.rgb;
    gl_Position = projectionMatrix * modelViewMatrix * vec4(position, 1.0);
  }`;
const FRAGMENT_SHADER = `
  flat varying vec3 colour;
  varying vec2 place;
  const float BORDER = 0.035;
  const float DARKER = 0.3;
  void main() {
    vec2 pixel = fwidth(place);
    vec2 border = clamp((BORDER - min(place, 1.0 - place)) / pixel + 0.5, 0.0, 1.0) * min(2.0 * BORDER / pixel, 1.0);
    gl_FragColor = vec4(colour * (1.0 - DARKER * max(border.x, border.y)), 1.0);
  }`;

// The chosen voxel: only the edges of a box around it, as broad as so many pixels.
const MARKER_PIXELS = 1.5;
const MARKER_VERTEX_SHADER = `
  varying vec2 place;
  void main() {
    place = uv;
    gl_Position = projectionMatrix * modelViewMatrix * vec4(position, 1.0);
  }`;
const MARKER_FRAGMENT_SHADER = `
  varying vec2 place;
  uniform float pixels;
  void main() {
    vec2 border = min(place, 1.0 - place) / fwidth(place);
    if (min(border.x, border.y) > pixels) discard;
    gl_FragColor = vec4(0.0, 0.72, 0.83, 1.0);
  }`;

// For each direction of a face and each byte of a colour, the byte that is drawn: the light of three.js's Lambert material.
const SHADES = DIRECTIONS.map(([axis, sign]) => {
  const light = AMBIENT + SUN * Math.max(0, (sign * SUN_POSITION[axis]) / Math.hypot(...SUN_POSITION));
  return Uint8ClampedArray.from({ length: 256 }, (_, byte) => {
    const { r } = new Color().setRGB(byte / 255, 0, 0, "srgb").multiplyScalar(light / Math.PI);
    return 255 * new Color(r, 0, 0).convertLinearToSRGB().r;
  });
});

// Two triangles a face.
function triangles(faces) {
  const corners = new Uint32Array(6 * faces);
  for (let face = 0; face < faces; face++) {
    for (let k = 0; k < 6; k++) corners[6 * face + k] = 4 * face + (k < 3 ? k : (k - 1) % 4);
  }
  return corners;
}

export class VoxelView {
  constructor(canvas, volume) {
    this.canvas = canvas;
    this.size = [canvas.clientWidth, canvas.clientHeight];
    // A picture waits for the next frame; a timer waits for rest; how many were drawn.
    this.pending = false;
    this.rest = null;
    this.drawn = 0;
    this.volume = volume;
    this.renderer = new WebGLRenderer({ canvas });
    this.scene = new Scene();
    this.scene.add(new AmbientLight(0xffffff, AMBIENT));
    const sun = new DirectionalLight(0xffffff, SUN);
    sun.position.set(...SUN_POSITION);
    this.scene.add(sun);

    const extent = Math.max(volume.maximum[0] - volume.minimum[0], volume.maximum[1] - volume.minimum[1]);
    this.extent = extent;
    this.camera = new PerspectiveCamera(45, 1, 0.1, extent * 10);
    this.camera.up.set(0, 0, 1);
    this.controls = new OrbitControls(this.camera, canvas);
    this.controls.maxPolarAngle = Math.PI * 0.495;
    this.controls.maxDistance = extent * 3;
    this.controls.addEventListener("change", () => this.requestRender());
    this.resetCamera();

    const car = new Mesh(new BoxGeometry(...CAR_SIZE), new MeshLambertMaterial({ color: 0x333a44 }));
    car.position.set(...CAR_CENTRE);
    this.scene.add(car);
    this.ground = new GridHelper(extent, 10);
    this.ground.rotation.x = Math.PI / 2;
    this.ground.position.z = volume.minimum[2];
    this.scene.add(this.ground);

    this.grid = new VoxelGrid(volume);
    this.material = new ShaderMaterial({ vertexShader: VERTEX_SHADER, fragmentShader: FRAGMENT_SHADER });
    const around = new BoxGeometry(...volume.voxel_size.map((size) => size * 1.15));
    this.marker = new Mesh(
      around,
      new ShaderMaterial({
        vertexShader: MARKER_VERTEX_SHADER,
        fragmentShader: MARKER_FRAGMENT_SHADER,
        uniforms: { pixels: { value: MARKER_PIXELS } },
        depthTest: false,
        side: DoubleSide,
      }),
    );
    this.marker.renderOrder = 1;
    this.marker.visible = false;
    this.scene.add(this.marker);
    this.voxelsVisible = true;
    this.lidarVisible = false;
    new ResizeObserver(() => this.resize()).observe(canvas.parentElement);
    this.resize();
  }

  resetCamera() {
    this.camera.position.set(0, -0.62 * this.extent, 0.46 * this.extent);
    this.controls.target.set(0, 0.02 * this.extent, 0);
    this.controls.update();
    this.requestRender();
  }

  resize() {
    const { clientWidth, clientHeight } = this.canvas.parentElement;
    if (!clientWidth || !clientHeight) return;
    this.size = [clientWidth, clientHeight];
    this.camera.aspect = clientWidth / clientHeight;
    this.camera.updateProjectionMatrix();
    this.requestRender();
  }

  // Drawn when something changed, not all the time: a page left open costs nothing. What moves is drawn without smooth
  // edges, which are most of the work where no graphics card takes part; once it rests, it is drawn again with them.
  requestRender() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.render();
      clearTimeout(this.rest);
      this.rest = setTimeout(() => {
        this.rest = null;
        this.renderSmooth();
      }, REST_MILLISECONDS);
      this.pending = false;
    });
  }

  render() {
    this.draw(1);
  }

  // Four pixels for each of the window, of which the browser draws the mean.
  renderSmooth() {
    this.draw(2);
  }

  draw(fineness) {
    const ratio = Math.max(fineness, Math.min(window.devicePixelRatio, 2));
    const [width, height] = this.size.map((length) => Math.floor(length * ratio));
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.renderer.setPixelRatio(ratio);
      this.renderer.setSize(...this.size, false);
    }
    this.drawn++;
    this.marker.material.uniforms.pixels.value = MARKER_PIXELS * ratio;
    if (this.voxels) this.hideBacks();
    this.renderer.render(this.scene, this.camera);
  }

  // Faces that turn their back to the camera are not even handed to the graphics card: about half.
  hideBacks() {
    const { layers } = this.faces;
    const position = this.camera.position.toArray();
    this.voxels.geometry.groups.forEach((group, direction) => {
      const first = this.grid.visibleFrom(layers, direction, position);
      group.start = 6 * first;
      group.count = 6 * (layers[direction].at(-1) - first);
    });
  }

  showFrame(frame) {
    for (const old of [this.voxels, this.lidar]) {
      if (!old) continue;
      this.scene.remove(old);
      old.geometry.dispose();
    }
    this.lidar?.material.dispose();
    this.frame = frame;
    this.grid.fill(frame.coordinates);
    this.faces = this.grid.faces();
    const faces = this.faces.voxels.length;
    const geometry = new BufferGeometry();
    geometry.setAttribute("position", new BufferAttribute(this.faces.positions, 3));
    geometry.setAttribute("shade", new BufferAttribute(new Uint8Array(16 * faces), 4, true));
    geometry.setIndex(new BufferAttribute(triangles(faces), 1));
    for (const _ of DIRECTIONS) geometry.addGroup(0, 0, 0);
    this.voxels = new Mesh(geometry, [this.material]);
    this.voxels.frustumCulled = false; // the view is hardly ever without a voxel
    this.voxels.visible = this.voxelsVisible;
    this.scene.add(this.voxels);
    const points = new BufferGeometry();
    points.setAttribute("position", new BufferAttribute(frame.lidar, 3));
    this.lidar = new Points(points, new PointsMaterial({ size: 1.6, sizeAttenuation: false, color: this.pointColour }));
    this.lidar.visible = this.lidarVisible;
    this.scene.add(this.lidar);
    this.requestRender();
  }

  // Three bytes a voxel.
  setColours(colours) {
    const { voxels, layers } = this.faces;
    const { shade } = this.voxels.geometry.attributes;
    const bytes = shade.array;
    SHADES.forEach((shades, direction) => {
      for (let face = layers[direction][0]; face < layers[direction].at(-1); face++) {
        for (let channel = 0; channel < 3; channel++) {
          const byte = shades[colours[3 * voxels[face] + channel]];
          for (let corner = 0; corner < 4; corner++) bytes[16 * face + 4 * corner + channel] = byte;
        }
      }
    });
    shade.needsUpdate = true;
    this.requestRender();
  }

  showLidar(visible) {
    this.lidarVisible = visible;
    if (this.lidar) this.lidar.visible = visible;
    this.requestRender();
  }

  showVoxels(visible) {
    this.voxelsVisible = visible;
    this.voxels.visible = visible;
    this.requestRender();
  }

  setTheme(dark) {
    this.scene.background = new Color(dark ? 0x12161c : 0xf3f5f8);
    this.pointColour = dark ? 0x9fb3c8 : 0x3d4d5f;
    if (this.lidar) this.lidar.material.color.set(this.pointColour);
    this.ground.material.color.set(dark ? 0x3d4855 : 0xb4bec9);
    this.ground.material.vertexColors = false;
    this.ground.material.needsUpdate = true;
    this.requestRender();
  }

  // The voxel under a point of the window, or -1.
  pick(clientX, clientY) {
    const area = this.canvas.getBoundingClientRect();
    const x = ((clientX - area.left) / area.width) * 2 - 1;
    const y = 1 - ((clientY - area.top) / area.height) * 2;
    const origin = this.camera.position;
    this.camera.updateMatrixWorld();
    const direction = new Vector3(x, y, 0.5).unproject(this.camera).sub(origin);
    return this.voxels.visible ? this.grid.firstVoxel(origin.toArray(), direction.toArray()) : -1;
  }

  // Where in the window a voxel's centre is drawn.
  place(voxel) {
    const point = new Vector3().fromArray(this.frame.centres, 3 * voxel).project(this.camera);
    const area = this.canvas.getBoundingClientRect();
    return { x: area.left + ((point.x + 1) / 2) * area.width, y: area.top + ((1 - point.y) / 2) * area.height };
  }

  mark(voxel) {
    this.marker.visible = voxel >= 0;
    if (voxel >= 0) this.marker.position.fromArray(this.frame.centres, 3 * voxel);
    this.requestRender();
  }

  // Turns towards a voxel, nearer if it is far away.
  lookAt(voxel) {
    const target = new Vector3().fromArray(this.frame.centres, 3 * voxel);
    const offset = this.camera.position.clone().sub(this.controls.target);
    offset.setLength(Math.min(offset.length(), this.extent * 0.35));
    this.controls.target.copy(target);
    this.camera.position.copy(target).add(offset);
    this.controls.update();
    this.requestRender();
  }

  // A picture of the view as it is, as a data URL.
  screenshot() {
    this.renderSmooth();
    return this.canvas.toDataURL("image/png");
  }
}
