// Carries out a job (docs/devices.md) with onnxruntime-web and posts what was measured. The address says which:
//   ?job=PATH            times every model, all in turns, and posts answers, times and the operators that were executed
//   ?job=PATH&memory=N   a page of its own that holds model N alone, for its memory; then the next model's, then the end
// Model by model: what one throws becomes its error, and the others go on.

import { interleave } from './loop.js';

const asked = new URLSearchParams(location.search), path = asked.get('job'), base = new URL('../files/' + path, location.href);
const IDENTITY = 'CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEBI='; // the least ONNX model there is
const ARRAYS = { float32: Float32Array, float64: Float64Array, float16: Uint16Array, int64: BigInt64Array, int32: Int32Array, int8: Int8Array,
  uint8: Uint8Array, bool: Uint8Array };
const PROFILED = 4; // runs with the profiler on; the first is not looked at

const say = (kind, told = {}) => fetch(new URL('../said', location.href), { method: 'POST', body: JSON.stringify({ kind, ...told }) });
const get = async (relative) => {
  const found = await fetch(new URL(relative, base));
  if (!found.ok) throw new Error(`${relative} cannot be read: ${found.status}`);
  return found.arrayBuffer();
};
const median = (values) => [...values].sort((a, b) => a - b)[Math.floor((values.length - 1) / 2)];
const words = (error) => String(error?.message ?? error).split('\n')[0].slice(0, 500);

// onnxruntime prints what its profiler saw; it takes console.log when it starts, so this must be there before.
const events = [], log = console.log.bind(console);
console.log = (...what) => {
  const text = what.join(' ').trim().replace(/,$/, '');
  if (!text.startsWith('{"cat"')) return text === '[' || text === ']' ? undefined : log(...what);
  try { events.push(JSON.parse(text)); } catch { log(text); }
};

// The smallest step that the clock makes, ms: browsers make it coarse, less so where the page is isolated.
function resolution() {
  const steps = [], end = performance.now() + 50;
  for (let before = performance.now(), now; before < end; before = now) if ((now = performance.now()) > before) steps.push(now - before);
  return steps.length ? Math.min(...steps) : null;
}

async function start(job) {
  const wanted = job.browser.provider, notes = [];
  let provider = wanted, adapter = null;
  if (wanted === 'webgpu') {
    adapter = await navigator.gpu?.requestAdapter().catch(() => null);
    if (!adapter) provider = 'wasm';
  }
  const ort = await import(new URL(`../ort/ort.${wanted === 'webgpu' && adapter ? 'webgpu' : 'wasm'}.min.mjs`, location.href));
  ort.env.logLevel = 'error';
  ort.env.wasm.wasmPaths = new URL('../ort/', location.href).href;
  ort.env.wasm.numThreads = crossOriginIsolated ? job.threads ?? Math.min(4, Math.ceil((navigator.hardwareConcurrency || 1) / 2)) : 1;
  const bytes = Uint8Array.from(atob(IDENTITY), (c) => c.charCodeAt(0));
  await (await ort.InferenceSession.create(bytes, { executionProviders: [provider] })).release(); // WebAssembly is compiled here, not in a model's load time
  const info = adapter?.info;
  return { ort, provider, options: { executionProviders: [provider] }, said: {
    provider, wanted, threads: ort.env.wasm.numThreads, isolated: crossOriginIsolated, agent: navigator.userAgent, cores: navigator.hardwareConcurrency,
    resolution: resolution(), version: ort.env.versions?.web ?? null, notes,
    adapter: info ? [info.vendor, info.architecture, info.device, info.description].filter(Boolean).join(' ') : null } };
}

async function open(ort, options, part) {
  const others = part.files.filter((f) => f !== part.file), folder = part.file.slice(0, part.file.lastIndexOf('/') + 1);
  const bytes = new Uint8Array(await get(part.file));
  const externalData = await Promise.all(others.map(async (f) => ({ path: f.slice(folder.length), data: new Uint8Array(await get(f)) })));
  const before = performance.now();
  const session = await ort.InferenceSession.create(bytes, externalData.length ? { ...options, externalData } : options);
  return { session, loadMs: performance.now() - before };
}

async function feed(ort, session, part) {
  const found = {};
  for (const input of part.inputs) {
    if (!session.inputNames.includes(input.name)) continue; // an export may drop one that nothing uses
    const Kind = ARRAYS[input.dtype];
    if (!Kind) throw new Error(`inputs of ${input.dtype} are not known here (${input.name})`);
    found[input.name] = new ort.Tensor(input.dtype, new Kind(await get(input.file)), input.shape);
  }
  return found;
}

const times = (count, run) => async () => { let last; for (let i = 0; i < count; i++) last = await run(); return last; };

// One model with its sessions: `parts[name]` has session, feeds and call; `together` runs all of them, later ones on what earlier ones gave.
async function load({ ort, options }, model) {
  const parts = {};
  for (const [name, part] of Object.entries(model.components)) {
    await say('stage', { model: model.id, doing: `opening ${part.file}` });
    const { session, loadMs } = await open(ort, options, part), feeds = await feed(ort, session, part);
    const run = () => session.run(feeds);
    parts[name] = { session, feeds, loadMs, outputs: part.outputs, calls: part.calls ?? 1, call: times(part.calls ?? 1, run), run };
  }
  const together = async () => {
    const given = {};
    for (const name of model.together) {
      const { session, feeds, calls } = parts[name];
      const joined = Object.fromEntries(Object.entries(feeds).map(([n, t]) => [n, given[n] && String(given[n].dims) === String(t.dims) ? given[n] : t]));
      Object.assign(given, await times(calls, () => session.run(joined))());
    }
  };
  return { parts, together };
}

async function answers(model, name, part, wanted) {
  await say('stage', { model: model.id, doing: `running ${name}` });
  const found = await part.run(), told = {}, folder = model.components[name].file.replace(/[^/]*$/, '');
  if (!wanted) return null;
  for (const output of part.outputs.filter((o) => found[o])) {
    const data = await found[output].getData(), file = `${folder}${name}.${output.replace(/[^\w.-]/g, '_')}.bin`;
    await fetch(new URL(file, base), { method: 'POST', body: new Blob([new Uint8Array(data.buffer, data.byteOffset, data.byteLength)]) });
    told[output] = file;
  }
  return told;
}

// What was executed: every operator with its provider, the types of its inputs, and the median of its times.
async function executed({ ort, options }, model, name, feeds) {
  await say('stage', { model: model.id, doing: `profiling ${name}` });
  const { session } = await open(ort, { ...options, enableProfiling: true }, model.components[name]);
  for (let i = 0; i < PROFILED; i++) await session.run(feeds);
  events.length = 0;
  session.endProfiling();
  await session.release();
  const nodes = new Map();
  for (const { cat, name: event, dur, args } of events.splice(0)) {
    if (cat !== 'Node' || !event.endsWith('_kernel_time')) continue;
    const key = `${args.node_index} ${event}`, types = (args.input_type_shape ?? []).map((t) => Object.keys(t)[0] ?? '');
    if (!nodes.has(key)) nodes.set(key, { name: event.replace(/_kernel_time$/, ''), op: args.op_name, provider: args.provider, types, us: [] });
    nodes.get(key).us.push(dur);
  }
  return [...nodes.values()].map(({ us, ...node }) => ({ ...node, ms: median(us.length > 1 ? us.slice(1) : us) / 1e3 }));
}

async function latency(job) {
  const runtime = await start(job), errors = {}, models = {}, told = {};
  await say('started', runtime.said);
  const guarded = async (id, work) => {
    try { return await work(); } catch (error) { errors[id] = words(error); await say('failed', { model: id, what: errors[id] }); delete models[id]; }
  };
  for (const model of job.models)
    await guarded(model.id, async () => {
      const loaded = await load(runtime, model), found = {};
      for (const [name, part] of Object.entries(loaded.parts)) found[name] = await answers(model, name, part, job.answers);
      models[model.id] = { ...loaded, model };
      told[model.id] = { answers: found };
    });
  let samples = {};
  while (Object.keys(models).length) {
    await say('stage', { model: null, doing: 'timing all models in turns' });
    const calls = {};
    for (const [id, { parts, together }] of Object.entries(models)) {
      for (const [name, part] of Object.entries(parts)) calls[`${name} ${id}`] = part.call;
      calls[` ${id}`] = together;
    }
    try { samples = await interleave(calls, job.browser.rule); break; } catch (error) { // one model less, and again
      const id = (error.measuring ?? '').slice((error.measuring ?? '').indexOf(' ') + 1);
      if (!(id in models)) throw error;
      await guarded(id, () => Promise.reject(error));
    }
  }
  for (const [id, { parts, model }] of Object.entries(models)) {
    const components = {};
    for (const [name, part] of Object.entries(parts)) {
      const nodes = await executed(runtime, model, name, part.feeds).catch((error) => ({ error: words(error) }));
      components[name] = { ...samples[`${name} ${id}`], load_ms: part.loadMs, nodes, answers: told[id].answers[name] };
    }
    await say('model', { model: id, components, together: samples[` ${id}`].values });
  }
}

async function memory(job, index) {
  const model = job.models[index];
  await say('stage', { model: model.id, doing: 'memory' });
  try {
    const runtime = await start(job), { together } = await load(runtime, model);
    await together();
    const late = new Promise((resolve) => setTimeout(resolve, 20000, null));
    const found = await Promise.race([performance.measureUserAgentSpecificMemory(), late]);
    await say('memory', { model: model.id, bytes: found?.bytes ?? null });
  } catch (error) {
    await say('memory', { model: model.id, bytes: null, what: words(error) });
  }
}

new Worker('beat.js');
try {
  const job = await (await fetch(base)).json(), index = asked.has('memory') ? Number(asked.get('memory')) : -1;
  if (index < 0) await latency(job);
  else await memory(job, index);
  const next = index + 1;
  if (job.memory && performance.measureUserAgentSpecificMemory && next < job.models.length)
    location.replace(`?${new URLSearchParams({ job: path, memory: next })}`);
  else await say('done');
} catch (error) {
  await say('fatal', { what: words(error) });
}
