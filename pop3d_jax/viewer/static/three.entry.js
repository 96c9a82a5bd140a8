// What the page uses of three.js. three.bundle.js is made of this file, unchanged parts of the library and no more:
//   npm install three@0.187.0 esbuild@0.28.2
//   npx esbuild three.entry.js --bundle --minify --format=esm --legal-comments=inline --outfile=three.bundle.js
export {
  AmbientLight, BoxGeometry, BufferAttribute, BufferGeometry, Color, DirectionalLight, DoubleSide, GridHelper, Mesh,
  MeshLambertMaterial, PerspectiveCamera, Points, PointsMaterial, REVISION, Scene, ShaderMaterial, Vector3, WebGLRenderer,
} from "three";
export { OrbitControls } from "three/addons/controls/OrbitControls.js";
