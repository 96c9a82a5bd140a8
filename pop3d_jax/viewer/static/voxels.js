// The voxels in three dimensions. Axes are the lidar's: x right, y forward, z up, metres.
import {
  AmbientLight, BoxGeometry, BufferAttribute, BufferGeometry, Color, DirectionalLight, EdgesGeometry, GridHelper,
  InstancedMesh, LineBasicMaterial, LineSegments, Matrix4, Mesh, MeshLambertMaterial, OrbitControls, PerspectiveCamera,
  Points, PointsMaterial, Raycaster, Scene, SRGBColorSpace, Vector2, Vector3, WebGLRenderer,
} from "three";

// A gap between voxels, so that they can be told apart.
const FILLING = 0.94;
const CAR_SIZE = [1.8, 4.5, 1.5];
// From the lidar on the roof to the middle of the car.
const CAR_CENTRE = [0, 0, -0.95];

export class VoxelView {
  constructor(canvas, volume) {
    this.canvas = canvas;
    this.volume = volume;
    this.renderer = new WebGLRenderer({ canvas, antialias: true });
    this.renderer.setPixelRatio(Math.min(window.devicePixelRatio, 2));
    this.scene = new Scene();
    this.scene.add(new AmbientLight(0xffffff, 1.9));
    const sun = new DirectionalLight(0xffffff, 1.6);
    sun.position.set(-0.4, -0.8, 1.5);
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

    this.box = new BoxGeometry(...volume.voxel_size.map((size) => size * FILLING));
    this.material = new MeshLambertMaterial();
    const edges = new EdgesGeometry(new BoxGeometry(...volume.voxel_size.map((size) => size * 1.15)));
    this.marker = new LineSegments(edges, new LineBasicMaterial({ color: 0x00b8d4, depthTest: false }));
    this.marker.renderOrder = 1;
    this.marker.visible = false;
    this.scene.add(this.marker);
    this.raycaster = new Raycaster();
    this.voxelsVisible = true;
    this.lidarVisible = false;
    this.pending = false;
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
    this.renderer.setSize(clientWidth, clientHeight, false);
    this.camera.aspect = clientWidth / clientHeight;
    this.camera.updateProjectionMatrix();
    this.requestRender();
  }

  // Drawn when something changed, not all the time: a page left open costs nothing.
  requestRender() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.render();
    });
  }

  render() {
    this.renderer.render(this.scene, this.camera);
  }

  showFrame(frame) {
    for (const old of [this.voxels, this.lidar]) {
      if (!old) continue;
      this.scene.remove(old);
      if (old.isInstancedMesh) {
        old.dispose();
      } else {
        old.geometry.dispose();
        old.material.dispose();
      }
    }
    this.frame = frame;
    this.voxels = new InstancedMesh(this.box, this.material, frame.count);
    const place = new Matrix4();
    for (let i = 0; i < frame.count; i++) {
      place.setPosition(frame.centres[3 * i], frame.centres[3 * i + 1], frame.centres[3 * i + 2]);
      this.voxels.setMatrixAt(i, place);
    }
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
    const colour = new Color();
    for (let i = 0; i < this.frame.count; i++) {
      colour.setRGB(colours[3 * i] / 255, colours[3 * i + 1] / 255, colours[3 * i + 2] / 255, SRGBColorSpace);
      this.voxels.setColorAt(i, colour);
    }
    if (this.voxels.instanceColor) this.voxels.instanceColor.needsUpdate = true;
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
    this.ground.material.color.set(dark ? 0x2b333d : 0xcfd6de);
    this.ground.material.vertexColors = false;
    this.ground.material.needsUpdate = true;
    this.requestRender();
  }

  // The voxel under a point of the window, or -1.
  pick(clientX, clientY) {
    const area = this.canvas.getBoundingClientRect();
    const x = ((clientX - area.left) / area.width) * 2 - 1;
    const y = 1 - ((clientY - area.top) / area.height) * 2;
    this.raycaster.setFromCamera(new Vector2(x, y), this.camera);
    const [nearest] = this.voxels.visible ? this.raycaster.intersectObject(this.voxels) : [];
    return nearest ? nearest.instanceId : -1;
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
    this.render();
    return this.canvas.toDataURL("image/png");
  }
}
