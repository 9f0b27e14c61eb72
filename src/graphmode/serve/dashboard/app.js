// Asks /dashboard/data once a second and shows what it says. Texts are set as text, never as HTML.

import { GraphColumns, LineChart, short } from "./charts.js";
import { startPrompt } from "./prompt.js";

const $ = (id) => document.getElementById(id);
const set = (id, text) => { const place = $(id); if (place.textContent !== text) place.textContent = text; };
const percent = (share, digits = 0) => (share === null || share === undefined ? "–" : (100 * share).toFixed(digits));

const charts = [
  new LineChart("throughput", [
    { key: "output", label: "out", color: "c-out", area: true },
    { key: "input", label: "in", color: "c-in" },
  ], { unit: " tokens/s", empty: "No requests in the last five minutes", least: 10 }),
  new LineChart("steps", [
    { key: "step_p50", label: "p50", color: "c-out" },
    { key: "step_p99", label: "p99", color: "c-tail" },
  ], { unit: " ms", empty: "No steps in the last five minutes", least: 1 }),
  new LineChart("queue", [
    { key: "running", label: "running", color: "c-out", area: true },
    { key: "waiting", label: "waiting", color: "c-in" },
  ], { empty: "Nothing known yet", least: 4 }),
];
const columns = new GraphColumns($("graphs"));

const PHASES = {
  connecting: "Connecting", starting: "Starting", ready: "Ready", stalled: "Stalled", dead: "Down", stopping: "Shutting down",
  lost: "No answer",
};
const REASONS = {
  disabled: "graphs are switched off", above_threshold: "larger than every graph", padding_ratio: "would pad too much",
  not_captured_yet: "not captured yet", capture_failed: "its capture failed", unsupported_op: "an operator cannot be captured",
  out_of_graphs: "no room for more graphs", out_of_memory: "no memory to capture it",
};
const ENDS = { stop: "ended by themselves", length: "reached their length", abort: "client left" };
const FAILED = { engine_down: "failed: engine down", deadline: "failed: deadline", error: "failed: error" };
const REJECTED = {
  queue_full: "turned away: queue full", invalid: "turned away: invalid", unauthorized: "turned away: no key", too_large: "turned away: too large",
  engine_down: "turned away: engine down", draining: "turned away: shutting down",
};

let started = 0, number = 0, points = [], replays = {}, skew = 0;

function phase(name, text) {
  $("state").dataset.phase = $("strip").dataset.phase = name;
  set("state-text", PHASES[name] ?? name);
  set("strip-text", text);
  document.title = name === "ready" ? `${$("tile-output").textContent} tokens/s · graphmode` : `${PHASES[name] ?? name} · graphmode`;
}

function showEngine({ engine, now, model, totals }) {
  const { phase: name, cause, captured, to_capture: all, restarts } = engine;
  const again = restarts ? `, started again ${restarts === 1 ? "once" : `${restarts} times`}` : "";
  const why = cause ? `: ${cause}` : "";
  const texts = {
    starting: all ? `Capturing graphs: ${captured} of ${all}${again}${why}` : `Loading the model${again}${why}`,
    ready: `${now.graphs ?? all} graphs held${totals.capture_seconds ? `, captured in ${totals.capture_seconds.toFixed(1)} s` : ""}${again}`,
    stopping: "No new requests are taken; those that run end.",
    stalled: cause ?? "Requests run and no step ends.",
    dead: cause ?? "The engine has ended.",
  };
  phase(name, texts[name] ?? cause ?? name);
  $("captures").max = all || 1;
  $("captures").value = name === "ready" ? all || 1 : captured;
  set("model", [model.name, model.device, model.dtype].filter(Boolean).join(" · "));
}

function showTiles({ now, window, model, totals }) {
  const last = points.at(-1);
  set("tile-output", short(last?.output ?? null));
  set("tile-input", short(last?.input ?? null));
  set("tile-output-more", `${short(totals.generation_tokens)} in all`);
  set("tile-input-more", `${short(totals.prompt_tokens)} in all`);
  set("tile-running", short(now.running));
  set("tile-running-unit", model.max_num_seqs ? `of ${model.max_num_seqs}` : "");
  set("tile-running-more", now.waiting === null ? "no engine" : `${now.waiting} waiting, ${now.streams} streams`);
  set("tile-first", short(window.first_token_ms?.p50 ?? null));
  set("tile-first-more", "median of the last minute");
  set("tile-kv", percent(now.kv, now.kv > 0 && now.kv < 0.0995 ? 1 : 0));
  $("kv-meter").value = now.kv ?? 0;
  const hits = window.hit_rate ?? null;
  set("tile-hits", hits === null ? "–" : hits === 1 ? "100" : Math.min(99.9, 100 * hits).toFixed(1));
  set("tile-hits-more", typeof window.padding === "number" ? `${percent(window.padding, 1)} % of rows padding` : window.steps ? "nothing is replayed" : "no steps in a minute");
}

function showGraphs({ window, model }) {
  const counts = window.replays ?? {}, steps = window.steps ?? 0;
  const captured = Object.entries(model.buckets ?? {}).flatMap(([family, sizes]) => sizes.map((size) => `${family}:${size}`));
  const keys = [...new Set([...captured, ...Object.keys(counts)])];
  const shown = keys.map((key) => {
    const [family, size] = key.split(":");
    return { family, size, steps: counts[key] ?? 0, share: steps ? (counts[key] ?? 0) / steps : 0, lit: (counts[key] ?? 0) > (replays[key] ?? 0) };
  }).sort((one, other) => one.family.localeCompare(other.family) || Number(one.size) - Number(other.size));
  replays = counts;
  const misses = Object.values(window.misses ?? {}).reduce((sum, each) => sum + each, 0);
  columns.update(shown, steps ? misses / steps : null, model.graph_mode === "none" ? "Graphs are switched off: every step runs eagerly" : "No graph is captured yet");
  set("graphs-aside", steps ? `${short(steps)} steps in the last minute` : "no steps in the last minute");
}

function bars(id, rows, none, color) {
  const list = $(id), most = Math.max(1, ...rows.map(([, count]) => count));
  if (!rows.length) {
    const item = document.createElement("li");
    item.className = "none";
    item.textContent = none;
    list.replaceChildren(item);
    return;
  }
  list.replaceChildren(...rows.map(([label, count, own]) => {
    const item = document.createElement("li"), name = document.createElement("span"), value = document.createElement("span"), bar = document.createElement("i");
    name.textContent = name.title = label;
    value.textContent = short(count);
    bar.className = own ?? color;
    bar.style.setProperty("--share", `${(100 * count) / most}%`);
    item.append(name, value, bar);
    return item;
  }));
}

function showLists({ window, totals, now, model, engine }) {
  const misses = Object.entries(window.misses ?? {}).filter(([, count]) => count > 0).sort((one, other) => other[1] - one[1]);
  bars("misses", misses.map(([reason, count]) => [REASONS[reason] ?? reason, count]),
    window.steps ? "None: a graph served every step." : "No steps in the last minute.", "c-bad");
  const named = (counts, names, color) => Object.entries(counts).filter(([, count]) => count > 0).map(([key, count]) => [names[key] ?? key, count, color]);
  bars("requests", [...named(totals.ended, ENDS, "c-out"), ...named(totals.failed, FAILED, "c-bad"), ...named(totals.rejected, REJECTED, "c-in")],
    "None yet. Send one from the box above.", "c-out");
  for (const [id, values] of [["first", window.first_token_ms], ["inter", window.inter_token_ms], ["step", window.step_ms]]) {
    [...$(`latency-${id}`).querySelectorAll("td")].forEach((cell, at) => { cell.textContent = short(values?.[["p50", "p95", "p99"][at]] ?? null); });
  }
  const hits = totals.prefix_queries ? totals.prefix_hits / totals.prefix_queries : null;
  const facts = [
    ["Longest sequence", model.max_model_len ? `${short(model.max_model_len)} tokens` : "–"],
    ["Graph mode", model.graph_mode ?? "–"],
    ["Memory of graphs", now.graph_bytes === null || now.graph_bytes === undefined ? "–" : `${(now.graph_bytes / 2 ** 20).toFixed(1)} MiB`],
    ["Prompt tokens cached", hits === null ? "–" : `${percent(hits)} %`],
    ["Preemptions", short(totals.preemptions)],
    ["Restarts", short(engine.restarts)],
  ];
  $("facts").replaceChildren(...facts.flatMap(([name, value]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
  $("failures").replaceChildren(...(totals.capture_failures ?? []).slice(0, 5).map((failure) => {
    const item = document.createElement("li");
    item.textContent = typeof failure === "string" ? failure : `${failure.graph}: ${failure.message}`;
    return item;
  }));
}

async function poll() {
  try {
    const query = new URLSearchParams({ after: number, started });
    const response = await fetch(`/dashboard/data?${query}`, { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (response.status === 401) return lost("The server asks for its key: reload the page to give it.");
    if (!response.ok) return lost(`The server answers ${response.status}.`);
    const data = await response.json();
    if (data.started !== started) points = [];
    ({ started, number } = data);
    points = [...points, ...data.points].slice(-320);
    skew = points.length ? points.at(-1).time - Date.now() / 1000 : skew;
    delete document.body.dataset.stale;
    const now = Math.max(Date.now() / 1000 + Math.min(skew, 0), points.at(-1)?.time ?? 0);
    for (const chart of charts) chart.update(points, now);
    showTiles(data);
    showGraphs(data);
    showLists(data);
    showEngine(data);
    set("version", `graphmode ${data.version}`);
    set("updated", `Updated ${new Date().toLocaleTimeString()}`);
  } catch {
    lost("The server does not answer. What is shown is what it said last.");
  }
}

function lost(text) {
  document.body.dataset.stale = "";
  phase("lost", text);
}

async function run() {
  for (;;) {
    if (!document.hidden) await poll();
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
startPrompt();
run();
