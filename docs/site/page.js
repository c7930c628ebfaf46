// SPDX-License-Identifier: Apache-2.0
// The page: takes an image, has the worker classify it, and shows the classes and the spectra.

const MEGABYTES = 20, MEGAPIXELS = 60, SIDE = 16384; // a canvas is at most this wide
const TYPES = ["image/jpeg", "image/png", "image/webp", "image/bmp"];
const TYPES_IN_WORDS = "JPEG, PNG, WebP or BMP";
const TOP = 5;
const DECADES = 4; // of magnitude that the colours tell apart, at most
const VIRIDIS = "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725".split(" ").map((colour) =>
  [0, 2, 4].map((at) => parseInt(colour.slice(at, at + 2), 16)));

/** Of the image that is shown: its logits and spectra, for whoever imports this module. */
export let result = null;

const find = (id) => document.getElementById(id);
let about = null; // what model.json says
let ready = false;
let number = 0; // of the last image; results of others come too late

const worker = new Worker(new URL("classifier.js", import.meta.url), {type: "module"});
worker.onerror = () => fail("The model could not be started. The page needs a browser of 2023 or later.");
worker.onmessage = ({data}) => {
  if (data.failed) return fail(`The model could not be loaded. ${data.failed}`);
  if (data.about) {
    about = data.about;
    return number || say(`Loading the model, ${Math.ceil(about.bytes / 1e6)} MB …`);
  }
  if (data.ready) {
    ready = true;
    return number || say("The model is ready.");
  }
  if (data.number !== number) return;
  if (data.error) fail(data.error);
  else show(data.result);
};

find("file").accept = TYPES.join();
find("limits").textContent = `${TYPES_IN_WORDS}, up to ${MEGABYTES} MB and ${MEGAPIXELS} megapixels`;
find("file").addEventListener("change", ({target}) => {
  if (target.files.length) classify(target.files[0]);
  target.value = ""; // so that choosing the same file again is a change
});
for (const button of document.querySelectorAll("#samples button")) {
  button.addEventListener("click", async () => {
    const {src} = button.querySelector("img");
    const blob = await (await fetch(src)).blob();
    classify(new File([blob], src.split("/").pop(), {type: "image/jpeg"}));
  });
}
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault(); // of the browser, to show the file
    find("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
  });
}
document.addEventListener("drop", ({dataTransfer}) => {
  if (dataTransfer.files.length) classify(dataTransfer.files[0]);
  else fail("That is not a file. Save the image first, then drop the file.");
});
say("Loading the model …");

async function classify(file) {
  const mine = ++number;
  result = null;
  const problem = await problemOf(file);
  if (mine !== number) return;
  if (problem) return fail(problem);
  say(`${ready ? "Classifying" : "Loading the model, then classifying"} ${file.name} …`);
  worker.postMessage({number: mine, file});
}

/** The reason why a file is not taken, or nothing. */
async function problemOf(file) {
  if (!TYPES.includes(file.type)) return `${file.name} is not an image of a type that is taken: ${TYPES_IN_WORDS}.`;
  if (file.size > MEGABYTES * 1e6) {
    return `${file.name} has ${(file.size / 1e6).toFixed(1)} MB; the limit is ${MEGABYTES} MB. Save a smaller copy.`;
  }
  const picture = new Image();
  picture.src = URL.createObjectURL(file);
  try {
    await new Promise((resolve, reject) => Object.assign(picture, {onload: resolve, onerror: reject})); // reads the size, decodes nothing
  } catch {
    return `${file.name} cannot be read as an image: the file is damaged.`;
  } finally {
    URL.revokeObjectURL(picture.src);
  }
  const {naturalWidth: width, naturalHeight: height} = picture;
  if (width * height > MEGAPIXELS * 1e6 || Math.max(width, height) > SIDE) {
    return `${file.name} has ${width} × ${height} pixels; the limit is ${MEGAPIXELS} megapixels and ${SIDE} pixels a side. Save a smaller copy.`;
  }
}

function say(text) {
  find("error").textContent = "";
  find("status").textContent = text;
}

function fail(text) {
  result = null;
  find("result").hidden = true;
  find("status").textContent = "";
  find("error").textContent = text;
}

function show(found) {
  const {pixels, logits, spectra, preparation, network} = found;
  const [all, before, after] = [preparation + network, preparation, network].map((time) => `${Math.round(time)} ms`);
  say(`Classified in ${all}: ${before} to decode and resize, ${after} for the network.`);
  showPicture(pixels);
  showClasses(softmax(logits));
  showSpectra(spectra);
  find("result").hidden = false;
  result = found;
}

function showPicture(pixels) {
  const channels = about.mean.length;
  paint(find("picture"), about.size, about.size, (pixel) => [0, 1, 2].map((i) => pixels[pixel * channels + (channels === 1 ? 0 : i)]));
}

function softmax(logits) {
  const largest = Math.max(...logits), powers = Array.from(logits, (logit) => Math.exp(logit - largest));
  const total = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / total);
}

function showClasses(confidences) {
  const best = [...confidences.keys()].sort((a, b) => confidences[b] - confidences[a]).slice(0, TOP);
  find("classes").replaceChildren(...best.map((i) => {
    const share = `${(100 * confidences[i]).toFixed(1)} %`;
    const bar = element("div", {className: "bar"});
    bar.style.width = `${100 * confidences[i]}%`;
    return element("li", {}, element("span", {textContent: about.classes[i]}), element("span", {textContent: share}), bar);
  }));
}

function showSpectra(spectra) {
  find("frequencies").hidden = !spectra.length;
  find("nothing").hidden = Boolean(spectra.length);
  if (!spectra.length) return;
  const levels = spectra.flatMap(({hifi, lofi}) => [...hifi, ...lofi]).map(Math.log10);
  const high = levels.reduce((a, b) => Math.max(a, b));
  const low = Math.max(high - DECADES, levels.reduce((a, b) => Math.min(a, b)));
  const colours = VIRIDIS.map((colour) => `rgb(${colour})`).join();
  find("scale").style.background = `linear-gradient(to right, ${colours})`;
  find("low").textContent = (10 ** low).toPrecision(2);
  find("high").textContent = (10 ** high).toPrecision(2);
  find("spectra").replaceChildren(...spectra.map(({block, height, width, ...branches}) => {
    const pictures = Object.entries({hifi: "Hi-Fi", lofi: "Lo-Fi"}).map(([branch, name]) => {
      const canvas = element("canvas", {role: "img", ariaLabel: `Spectrum of ${name} in ${block}`});
      paint(canvas, width, height, (cell) => viridis((Math.log10(branches[branch][cell]) - low) / (high - low)));
      return element("div", {}, canvas, element("span", {textContent: name}));
    });
    return element("figure", {}, element("div", {className: "pair"}, ...pictures), element("figcaption", {textContent: block}));
  }));
}

/** A position from 0 to 1 on the colour map -> red, green, blue. */
function viridis(position) {
  const at = Math.min(Math.max(position, 0), 1) * (VIRIDIS.length - 1), i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[i].map((value, channel) => value + (at - i) * (VIRIDIS[i + 1][channel] - value));
}

function paint(canvas, width, height, colourOf) {
  const data = Uint8ClampedArray.from({length: 4 * width * height}, () => 255);
  for (let i = 0; i < width * height; i++) data.set(colourOf(i), 4 * i);
  Object.assign(canvas, {width, height}).getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
