// SPDX-License-Identifier: Apache-2.0
// The evaluation's preprocessing (litv2/preprocess.py) of a decoded image: bicubic resize with antialiasing as Pillow computes it, to the
// bit, and the crop of the centre. A canvas scales in a way of its own, which changes the logits.

const STRIP = 256; // rows that are read at once: a large photograph's pixels would fill the memory of a phone
const FRACTION = 2 ** 22; // weights are integers of this unit

/** ImageBitmap -> pixels (size, size, channels), in bytes. */
export function resizeAndCrop(bitmap, {size, short_side, mean}) {
  const short = Math.min(bitmap.width, bitmap.height);
  const resized = (side) => (short_side === null ? size : Math.trunc((short_side * side) / short));
  const columns = weightsOf(bitmap.width, resized(bitmap.width), size);
  const rows = weightsOf(bitmap.height, resized(bitmap.height), size);
  const channels = mean.length;

  const first = rows[0].start, last = rows.at(-1).start + rows.at(-1).weights.length;
  const narrow = new Uint8ClampedArray((last - first) * size * channels);
  const context = new OffscreenCanvas(bitmap.width, STRIP).getContext("2d", {willReadFrequently: true});
  context.globalCompositeOperation = "copy";
  for (let row = first; row < last; row += STRIP) {
    const height = Math.min(STRIP, last - row);
    context.drawImage(bitmap, 0, -row);
    const {data} = context.getImageData(0, 0, bitmap.width, height);
    if (channels === 1) toGrey(data);
    for (let y = 0; y < height; y++) {
      const target = (row - first + y) * size * channels;
      columns.forEach(({start, weights}, x) => sum(data, (y * bitmap.width + start) * 4, 4, weights, narrow, target + x * channels, channels));
    }
  }
  const pixels = new Uint8ClampedArray(size * size * channels);
  const stride = size * channels;
  rows.forEach(({start, weights}, y) => {
    for (let x = 0; x < stride; x++) sum(narrow, (start - first) * stride + x, stride, weights, pixels, y * stride + x, 1);
  });
  return pixels;
}

/** Pixels (size, size, channels) -> the model's input (channels, size, size). */
export function normalise(pixels, {mean, std}) {
  const count = pixels.length / mean.length;
  return Float32Array.from(pixels, (_, i) => {
    const channel = Math.floor(i / count), pixel = i % count;
    return (pixels[pixel * mean.length + channel] / 255 - mean[channel]) / std[channel];
  });
}

/** Of the `count` central ones of the `resized` pixels that an axis of `length` becomes: where the weights start, and the weights. */
function weightsOf(length, resized, count) {
  const half = Math.floor((resized - count) / 2);
  const first = (resized - count) % 2 ? half + (half % 2) : half; // halves are rounded to the even number, as in Python
  const scale = length / resized, spread = Math.max(scale, 1), support = 2 * spread;
  return Array.from({length: count}, (_, i) => {
    const centre = (first + i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(length, Math.trunc(centre + support + 0.5));
    const weights = Array.from({length: end - start}, (_, j) => cubic((start + j - centre + 0.5) * (1 / spread)));
    const total = weights.reduce((a, b) => a + b);
    return {start, weights: Int32Array.from(weights, (weight) => (weight / total) * FRACTION + 0.5 * Math.sign(weight))};
  });
}

function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/** Weighted sums of `channels` neighbouring values; a clamped array clips them to bytes. */
function sum(source, from, step, weights, target, to, channels) {
  for (let channel = 0; channel < channels; channel++) {
    let total = FRACTION / 2;
    for (let i = 0, at = from + channel; i < weights.length; i++, at += step) total += source[at] * weights[i];
    target[to + channel] = Math.floor(total / FRACTION);
  }
}

/** Replaces red by the luma, rounded as Pillow does. */
function toGrey(data) {
  for (let i = 0; i < data.length; i += 4) data[i] = (data[i] * 19595 + data[i + 1] * 38470 + data[i + 2] * 7471 + 0x8000) >> 16;
}
