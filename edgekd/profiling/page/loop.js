// The measuring loop of edgekd/profiling/board/loop.py for calls that are awaited: the same warm-up, the same turns, the same counts.
// `rule` has that file's constants; `clock` gives milliseconds. tests/test_browser.py holds the two against each other.

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const spread = (values) => Math.sqrt(mean(values.map((v) => (v - mean(values)) ** 2)));
const sum = (values) => values.reduce((a, b) => a + b, 0);

async function timed(call, clock) {
  const start = clock();
  await call();
  return clock() - start;
}

export async function warmUp(call, { least, most, cv, maxSeconds, window }, clock) {
  const times = [];
  let steady = false;
  while (!steady && times.length < most && (times.length < least || sum(times) < maxSeconds * 1e3)) {
    times.push(await timed(call, clock));
    const recent = times.slice(-window);
    steady = times.length >= Math.max(least, window) && spread(recent) <= cv * mean(recent);
  }
  return { values: [], warmup: times.length, steady };
}

// calls: {name: async function} -> {name: {values (ms), warmup, steady}}. What a call throws has its name in `measuring`.
export async function interleave(calls, rule, clock = () => performance.now()) {
  const found = {}, order = Object.keys(calls);
  const wanted = ({ values }) => {
    const over = sum(values) >= rule.maxSeconds * 1e3;
    const most = rule.mode === 'time' ? (over ? rule.minSamples : rule.mostSamples) : over ? Math.min(rule.repeats, rule.minSamples) : rule.repeats;
    return Math.max(0, most - values.length);
  };
  let name;
  try {
    for (name of order) found[name] = await warmUp(calls[name], { ...rule, least: rule.warmup, maxSeconds: rule.maxSeconds / 4 }, clock);
    while (order.some((n) => wanted(found[n]))) {
      for (name of order) {
        const burst = Math.min(rule.burst, wanted(found[name]));
        if (burst) await calls[name]();
        for (let i = 0; i < burst; i++) found[name].values.push(await timed(calls[name], clock));
      }
      order.reverse();
    }
  } catch (error) {
    throw Object.assign(error instanceof Error ? error : new Error(String(error)), { measuring: name });
  }
  return found;
}
