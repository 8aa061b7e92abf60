// face-api as a contestant of benchmarks.accuracy. Once:
//   mkdir FOLDER && cd FOLDER && npm install @vladmandic/face-api @tensorflow/tfjs @tensorflow/tfjs-backend-wasm jpeg-js
// then
//   python -m benchmarks.accuracy --data-dir UTKFACE \
//       --also "face-api, its detector=node benchmarks/face_api.mjs FOLDER" \
//       --also "face-api, whole picture=node benchmarks/face_api.mjs FOLDER whole"
// `python -m benchmarks` takes these options too.
// It reads names of JPEG files from its input and prints age and gender of the largest face of each, or, since its
// detector misses most faces that fill their picture, of the whole picture. Its guide says that it was trained on four
// fifths of UTKFace, so it has seen most of these pictures; on its own fifth of it, it names 5.25 years and 93%.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [, , path = ".", faces = "detect"] = process.argv;
const folder = resolve(path);
const require = createRequire(`${folder}/`);
const tf = require("@tensorflow/tfjs");
const wasm = require("@tensorflow/tfjs-backend-wasm");
const jpeg = require("jpeg-js");

wasm.setWasmPaths(`${folder}/node_modules/@tensorflow/tfjs-backend-wasm/dist/`);
await tf.setBackend("wasm");
await tf.ready();
const faceapi = require("@vladmandic/face-api/dist/face-api.node-wasm.js");
const weights = `${folder}/node_modules/@vladmandic/face-api/model`;
const { ssdMobilenetv1, faceLandmark68Net, ageGenderNet } = faceapi.nets;
for (const net of [ssdMobilenetv1, faceLandmark68Net, ageGenderNet]) await net.loadFromDisk(weights);

async function largest(image) {
  if (faces === "whole") return ageGenderNet.predictAgeAndGender(image);
  const found = await faceapi.detectAllFaces(image).withFaceLandmarks().withAgeAndGender();
  return found.sort((one, other) => other.detection.box.area - one.detection.box.area)[0];
}

for (const name of readFileSync(0, "utf8").split("\n").filter(Boolean)) {
  const { data, width, height } = jpeg.decode(readFileSync(name), { useTArray: true, formatAsRGBA: false });
  const image = tf.tensor3d(data, [height, width, 3], "int32");
  const face = await largest(image);
  image.dispose();
  console.log(JSON.stringify(face ? { age: face.age, gender: face.gender } : {}));
}
