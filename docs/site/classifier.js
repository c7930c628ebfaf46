// SPDX-License-Identifier: Apache-2.0
// A worker that loads the model and classifies images one after the other, so that the page stays responsive meanwhile.

import * as ort from "./ort.wasm.bundle.min.js";
import {normalise, resizeAndCrop} from "./preprocess.js";

ort.env.wasm.numThreads = 1; // more need headers that servers of static files do not send
ort.env.wasm.wasmPaths = {wasm: new URL("ort-wasm-simd-threaded.wasm", import.meta.url).href};

const loading = load();
let working = Promise.resolve();
loading.then(() => postMessage({ready: true}), ({message}) => postMessage({failed: message}));

onmessage = ({data: {number, file}}) => {
  working = working.then(async () => {
    try {
      postMessage({number, result: await classify(file, await loading)});
    } catch ({message}) {
      postMessage({number, error: message});
    }
  });
};

async function load() {
  const about = await (await fetched("model.json")).json();
  postMessage({about});
  const graph = new Uint8Array(await (await fetched("model.onnx")).arrayBuffer());
  return {about, session: await ort.InferenceSession.create(graph, {executionProviders: ["wasm"]})};
}

async function fetched(name) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
  return response;
}

async function classify(file, {about, session}) {
  const start = performance.now();
  const bitmap = await decode(file);
  const pixels = resizeAndCrop(bitmap, about);
  bitmap.close();
  const images = new ort.Tensor("float32", normalise(pixels, about), [1, about.mean.length, about.size, about.size]);
  const prepared = performance.now();
  const outputs = await session.run({images});
  const end = performance.now();
  const spectra = about.blocks.map((block) => {
    const {data, dims: [, , height, width]} = outputs[block];
    const [hifi, lofi] = [data.slice(0, height * width), data.slice(height * width)];
    return {block, height, width, hifi, lofi};
  });
  return {pixels, logits: outputs.logits.data, spectra, preparation: prepared - start, network: end - prepared};
}

async function decode(file) {
  try {
    return await createImageBitmap(file, {colorSpaceConversion: "none"}); // the numbers in the file, as Pillow reads them
  } catch {
    throw new Error(`${file.name} cannot be read as an image: the file is damaged.`);
  }
}
