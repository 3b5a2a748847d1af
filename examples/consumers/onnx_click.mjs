// Segment what one click on a photo means, with an ONNX artifact, in Node:
//
//     npm ci && node onnx_click.mjs ARTIFACT PHOTO X,Y [MASK.png]
//
// ORT=onnxruntime-web runs it on WebAssembly, as a browser does. Photos are JPEG or PNG and upright: EXIF is not read.
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import jpeg from 'jpeg-js';
import { PNG } from 'pngjs';
import { segment } from './onnx_click.js';

const [artifact, file, click, output = 'mask.png'] = process.argv.slice(2);
const ort = await import(process.env.ORT ?? 'onnxruntime-node');
const manifest = JSON.parse(await readFile(join(artifact, 'manifest.json'), 'utf8'));
const open = async (part) => ort.InferenceSession.create(await readFile(join(artifact, manifest.components[part].file)));
const bytes = await readFile(file);
const photo = bytes[0] === 0x89 ? PNG.sync.read(bytes) : jpeg.decode(bytes, { useTArray: true, maxMemoryUsageInMB: 4096 });
const found = await segment(ort, await open('encoder'), await open('decoder'), manifest, photo, click.split(',').map(Number));
const png = new PNG({ width: photo.width, height: photo.height, colorType: 0, inputColorType: 0, inputHasAlpha: false, bitDepth: 8 });
png.data = Buffer.from(found.mask.map((on) => on * 255));
await writeFile(output, PNG.sync.write(png, { colorType: 0, inputColorType: 0, inputHasAlpha: false }));
console.log(JSON.stringify({ mask: output, iou: found.iou, share: found.share }));
