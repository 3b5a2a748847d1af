// What an ONNX artifact of edgekd needs around its two files, for Node and browsers alike: a photo and a click in, a mask out. No imports:
// `ort` is onnxruntime-node or onnxruntime-web. onnx_click.mjs (Node) and onnx_click.html (browser) use it.

// (width, height) that the photo has in a square of this side, at the top left; the rest is padding.
function sizeIn(side, photo, spec) {
  const inside = (n) => (spec.pad === 'stretch' ? side : Math.max(1, Math.floor((n * side) / Math.max(photo.width, photo.height) + 0.5)));
  return [inside(photo.width), inside(photo.height)];
}

// One axis of Pillow's bilinear filter, which sees all pixels when it shrinks: rows of `width` pixels become columns of `to` pixels.
function resizeAxis(data, width, height, channels, to, round) {
  const out = new Float32Array(to * height * channels), scale = width / to, reach = Math.max(scale, 1);
  for (let x = 0; x < to; x++) {
    const centre = (x + 0.5) * scale, weights = [];
    const first = Math.max(0, Math.floor(centre - reach + 0.5)), end = Math.min(width, Math.floor(centre + reach + 0.5));
    for (let i = first; i < end; i++) weights.push(Math.max(0, 1 - Math.abs(i + 0.5 - centre) / reach));
    const total = weights.reduce((a, b) => a + b);
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < channels; c++) {
        let sum = 0;
        weights.forEach((weight, k) => (sum += weight * data[(y * width + first + k) * channels + c]));
        out[(x * height + y) * channels + c] = round ? Math.floor(sum / total + 0.5) : sum / total;
      }
    }
  }
  return out;
}

function resize(data, width, height, channels, toWidth, toHeight, round = false) {
  return resizeAxis(resizeAxis(data, width, height, channels, toWidth, round), height, toWidth, channels, toHeight, round);
}

// photo: {width, height, data: RGBA bytes}; click: [x, y] in its pixels -> {mask: a byte a pixel, 0 or 1; iou: as the model predicts it; share}
export async function segment(ort, encoder, decoder, manifest, photo, click) {
  const spec = manifest.preprocess, size = spec.image_size, side = spec.prompt_size ?? size, points = manifest.components.decoder.fixed?.points ?? 1;
  const tensor = (data, ...shape) => new ort.Tensor('float32', data, shape);
  const [width, height] = sizeIn(size, photo, spec), small = resize(photo.data, photo.width, photo.height, 4, width, height, true);
  const images = new Float32Array(3 * size * size);
  for (let c = 0; c < 3; c++)
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++) images[(c * size + y) * size + x] = (small[(y * width + x) * 4 + c] - spec.mean[c]) / spec.std[c];
  const { image_embeddings } = await encoder.run({ images: tensor(images, 1, 3, size, size) });
  const [w, h] = sizeIn(side, photo, spec), coords = new Float32Array(2 * points), labels = new Float32Array(points).fill(-2); // -2: no such point
  coords.set([(click[0] * w) / photo.width - 0.5, (click[1] * h) / photo.height - 0.5]); // SAM counts pixel centres from 0
  labels[0] = 1;
  const { masks, iou } = await decoder.run({
    image_embeddings, point_coords: tensor(coords, 1, points, 2), point_labels: tensor(labels, 1, points),
    mask_input: tensor(new Float32Array((side / 4) ** 2), 1, 1, side / 4, side / 4), has_mask: tensor(new Float32Array(1), 1),
  });
  const square = resize(masks.data, side / 4, side / 4, 1, side, side); // mask 0; masks 1 to 3 are other readings of a click
  const inside = new Float32Array(w * h);
  for (let y = 0; y < h; y++) inside.set(square.subarray(y * side, y * side + w), y * w);
  const mask = Uint8Array.from(resize(inside, w, h, 1, photo.width, photo.height), (logit) => (logit > 0 ? 1 : 0));
  return { mask, iou: iou.data[0], share: mask.reduce((a, b) => a + b, 0) / mask.length };
}
