// Line charts and the columns of graphs, as SVG. Texts are set as text, never as HTML.

const NS = "http://www.w3.org/2000/svg";
const LEFT = 44, BOTTOM = 18, TOP = 6, SECONDS = 300;

export function element(name, attributes = {}, text) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// The next of 1, 2, 5 times a power of ten: an axis that seldom changes.
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * 0.999999);
}

export function short(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
  if (size >= 1e5) return (value / 1e3).toFixed(0) + "k";
  if (size >= 1e4) return (value / 1e3).toFixed(1).replace(".0", "") + "k";
  if (size >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return size >= 10 ? value.toFixed(Math.max(digits - 2, 0)) : value.toFixed(Math.max(digits - 1, 0));
}

export class LineChart {
  // series: {key, label, color, area, step}; unit: what stands behind a value.
  constructor(id, series, { unit = "", empty, least = 1 }) {
    this.box = document.getElementById(`chart-${id}`);
    this.height = Number(this.box.dataset.height);
    this.box.style.height = `${this.height}px`;
    Object.assign(this, { series, unit, least, points: [] });
    this.svg = element("svg", { role: "img", "aria-labelledby": `title-${id}` });
    this.none = document.createElement("p");
    this.none.className = "empty";
    this.none.textContent = empty;
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    this.box.replaceChildren(this.svg, this.none, this.tip);
    this.legend = new Map();
    const list = document.getElementById(`legend-${id}`);
    for (const { key, label, color } of series) {
      const item = document.createElement("li"), swatch = document.createElement("span"), value = document.createElement("b");
      swatch.className = `swatch ${color}`;
      value.textContent = "–";
      item.append(swatch, label, value);
      list.append(item);
      this.legend.set(key, value);
    }
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  update(points, now) {
    this.points = points;
    this.now = now;
    const last = points.at(-1);
    for (const { key } of this.series) this.legend.get(key).textContent = last ? short(last[key]) : "–";
    this.draw();
  }

  x(time) { return LEFT + (this.width - LEFT) * (1 - (this.now - time) / SECONDS); }

  draw() {
    this.width = this.box.clientWidth;
    if (!this.width) return;
    const shown = this.points.filter((each) => this.now - each.time <= SECONDS);
    const values = shown.flatMap((each) => this.series.map(({ key }) => each[key])).filter((each) => each !== null);
    const top = ceiling(Math.max(this.least, ...values));
    const floor = this.height - BOTTOM, y = (value) => TOP + (floor - TOP) * (1 - value / top);
    const drawn = [];
    for (const share of [0, 0.5, 1]) {
      const at = y(share * top);
      drawn.push(element("line", { x1: LEFT, x2: this.width, y1: at, y2: at, class: "grid" }));
      drawn.push(element("text", { x: LEFT - 8, y: at + 4, "text-anchor": "end" }, short(share * top, 2)));
    }
    for (const [minutes, anchor] of [[5, "start"], [2.5, "middle"], [0, "end"]]) {
      const at = LEFT + (this.width - LEFT) * (1 - minutes / 5);
      drawn.push(element("text", { x: at, y: this.height - 3, "text-anchor": anchor }, minutes ? `${minutes} min ago` : "now"));
    }
    for (const { key, color, area } of this.series) {
      for (const run of runs(shown, key)) {
        const path = run.map((each) => `${this.x(each.time).toFixed(1)} ${y(each[key]).toFixed(1)}`).join("L");
        if (area) {
          const edges = [run.at(-1), run[0]].map((each) => `${this.x(each.time).toFixed(1)} ${floor}`).join("L");
          drawn.push(element("path", { d: `M${path}L${edges}Z`, class: `area ${color}` }));
        }
        drawn.push(element("path", { d: `M${path}`, class: `series ${color}`, "stroke-linecap": "round" }));
      }
    }
    this.cross = element("line", { class: "cross", y1: TOP, y2: floor, visibility: "hidden" });
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.svg.replaceChildren(...drawn, this.cross);
    this.none.hidden = values.length > 0;
    if (this.at !== undefined) this.read(this.at);
  }

  point(event) {
    this.at = event ? event.clientX - this.svg.getBoundingClientRect().left : undefined;
    this.read(this.at);
  }

  read(at) {
    const near = at === undefined || at < LEFT ? undefined : this.points.reduce(
      (best, each) => (best && Math.abs(this.x(best.time) - at) <= Math.abs(this.x(each.time) - at) ? best : each), undefined);
    this.tip.hidden = !near;
    this.cross?.setAttribute("visibility", near ? "visible" : "hidden");
    if (!near) return;
    const x = this.x(near.time), ago = Math.round(this.now - near.time);
    this.cross.setAttribute("x1", x);
    this.cross.setAttribute("x2", x);
    const lines = this.series.map(({ key, label }) => `${label} ${short(near[key])}${this.unit}`);
    this.tip.textContent = [ago ? `${ago} s ago` : "now", ...lines].join("\n");
    const left = x + 12 + this.tip.offsetWidth > this.width ? x - 12 - this.tip.offsetWidth : x + 12;
    this.tip.style.left = `${Math.max(0, left)}px`;
  }
}

// Points that follow each other: a line breaks where nothing is known, or the server said nothing for a while.
function runs(points, key) {
  const found = [];
  let before;
  for (const each of points) {
    if (each[key] === null) { before = undefined; continue; }
    if (!before || each.time - before.time > 5) found.push([]);
    found.at(-1).push(each);
    before = each;
  }
  return found;
}

export class GraphColumns {
  constructor(box) {
    this.box = box;
    this.svg = element("svg", { role: "img" });
    this.none = document.createElement("p");
    this.none.className = "empty";
    box.replaceChildren(this.svg, this.none);
    new ResizeObserver(() => this.draw()).observe(box);
  }

  // columns: {family, size, share, steps, lit}, in groups by family; eager: the share of steps without a graph.
  update(columns, eager, empty) {
    Object.assign(this, { columns, eager });
    this.none.textContent = empty;
    this.draw();
  }

  draw() {
    const width = this.box.clientWidth, height = this.box.clientHeight;
    if (!width || !this.columns) return;
    const groups = Map.groupBy ? Map.groupBy(this.columns, (each) => each.family) : grouped(this.columns);
    const shown = [...groups.entries(), ...(this.eager === null ? [] : [["no graph", [{ size: "", share: this.eager, eager: true }]]])];
    const count = shown.reduce((sum, [, each]) => sum + each.length, 0);
    const gap = 22, room = (width - gap * Math.max(shown.length - 1, 0) - 40) / Math.max(count, 1), pitch = Math.min(room, 46);
    const bar = Math.max(2, Math.min(pitch - 3, 30)), floor = height - 36, most = Math.max(0.05, ...this.columns.map((each) => each.share), this.eager ?? 0);
    const drawn = [];
    let x = 0;
    for (const [family, columns] of shown) {
      const every = Math.ceil(30 / pitch);
      columns.forEach((each, number) => {
        const high = (floor - 18) * (each.share / most), kind = each.eager && each.share ? " eager" : "";
        const group = element("g");
        group.append(element("title", {}, `${family} ${each.size}: ${each.eager ? "" : `${each.steps} steps, `}${(100 * each.share).toFixed(1)} % of the last minute`));
        group.append(element("rect", { x, y: floor - 2, width: bar, height: 2, rx: 1, class: `column-base${kind}` }));
        if (each.share > 0) {
          group.append(element("rect", { x, y: floor - Math.max(high, 2), width: bar, height: Math.max(high, 2), rx: Math.min(3, bar / 2), class: `column-bar${each.lit ? " lit" : ""}${kind}` }));
          if (pitch > 26 || each.share === most) group.append(element("text", { x: x + bar / 2, y: floor - high - 5, "text-anchor": "middle" }, each.share < 0.01 ? "<1%" : `${Math.round(100 * each.share)}%`));
        }
        if (number % every === 0 || number === columns.length - 1 && number % every > every / 2) group.append(element("text", { x: x + bar / 2, y: floor + 14, "text-anchor": "middle" }, each.size));
        drawn.push(group);
        x += pitch;
      });
      drawn.push(element("text", { x: x - columns.length * pitch, y: floor + 31 }, family));
      x += Math.max(gap, columns.length * pitch < 52 ? 52 - columns.length * pitch : 0);
    }
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const best = this.columns.reduce((top, each) => (each.share > (top?.share ?? 0) ? each : top), undefined);
    this.svg.setAttribute("aria-label", best ? `Most used: ${best.family} ${best.size}, ${(100 * best.share).toFixed(0)} % of the steps` : this.none.textContent);
    this.svg.replaceChildren(...drawn);
    this.none.hidden = this.columns.length > 0;
  }
}

function grouped(columns) {
  const groups = new Map();
  for (const each of columns) groups.set(each.family, [...(groups.get(each.family) ?? []), each]);
  return groups;
}
