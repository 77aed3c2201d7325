"use strict";
// Draws every chart from the JSON beside it. What a reader chooses outlives a reload, where the browser keeps it.
const root = document.documentElement;
const PHONE = 600;

function kept(store, key, value) {
  try {
    if (value !== undefined) store.setItem(key, value);
    return store.getItem(key);
  } catch { return null; } // a browser that keeps nothing for files
}

const probe = document.body.appendChild(document.createElement("i"));
probe.hidden = true;
function css(name) { // as rgb(), in the theme of now
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}
const parts = (rgb) => rgb.match(/[\d.]+/g).slice(0, 3).map(Number);
const faint = (rgb, alpha) => `rgba(${parts(rgb).join(",")},${alpha})`;

function colour(name) { // "c3" of the palette, "s0.25" of the scale, null for grey
  if (name === null) return css("--muted");
  if (name[0] === "c") return css(`--${name}`);
  const at = 4 * Number(name.slice(1)), i = Math.min(Math.floor(at), 3);
  const [low, high] = [parts(css(`--s${i}`)), parts(css(`--s${i + 1}`))];
  return `rgb(${low.map((x, j) => Math.round(x + (at - i) * (high[j] - x))).join(",")})`;
}

const SCALE = `linear-gradient(to right, ${[0, 1, 2, 3, 4].map((i) => `var(--s${i})`)})`;

function element(tag, parent, properties = {}) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

function image(format, icon) { // a button that saves a chart as a file of this format
  const title = `Save as ${format.toUpperCase()}`;
  return { name: title, title, icon: Plotly.Icons[icon], click: (plot) => {
    const filename = plot.closest(".chart").querySelector("h3").textContent;
    Plotly.downloadImage(plot, { format, filename, width: plot.clientWidth, height: plot.clientHeight, scale: format === "png" ? 2 : 1 });
  } };
}

class Chart {
  constructor(card) {
    this.spec = JSON.parse(card.querySelector("script").textContent);
    this.key = `${location.pathname}#${card.querySelector("h3").textContent}`;
    const axis = (axes) => ({ at: 0, log: axes.map((a) => a.log) });
    this.frames = this.spec.frames.length;
    this.state = { x: axis(this.spec.x), y: axis(this.spec.y), hidden: [], frame: this.frames - 1 };
    const chosen = JSON.parse(kept(sessionStorage, this.key));
    if (chosen && ["x", "y"].every((which) => this.fits(chosen[which], this.spec[which]))) Object.assign(this.state, chosen);
    this.state.frame = Math.min(this.state.frame, this.frames - 1);
    this.controls(card.querySelector(".controls"));
    this.legend(card.querySelector(".legend"));
    this.plot = card.querySelector(".plot");
    this.draw();
  }

  fits(state, axes) { // what was chosen in an earlier writing of the page, which may have had other axes
    return state.at < axes.length && state.log.length === axes.length && axes.every((a, i) => (a.log === null) === (state.log[i] === null));
  }

  changed() {
    kept(sessionStorage, this.key, JSON.stringify(this.state));
    this.draw();
  }

  axis(which) { return this.spec[which][this.state[which].at]; }

  controls(bar) {
    const refreshers = [];
    const button = (parent, text, isOn, press) => {
      const b = element("button", parent, { type: "button", textContent: text });
      b.onclick = () => { press(); refreshers.forEach((f) => f()); this.changed(); };
      refreshers.push(() => b.setAttribute("aria-pressed", isOn()));
    };
    for (const which of ["y", "x"]) {
      const axes = this.spec[which], state = this.state[which];
      if (axes.every((a) => a.words)) continue;
      if (axes.length > 1) {
        const segments = element("span", bar, { className: "segments" });
        axes.forEach((a, i) => button(segments, a.label, () => state.at === i, () => { state.at = i; }));
      }
      if (axes.every((a) => a.log === null)) continue;
      const scale = element("span", bar, { className: "segments" });
      for (const log of [false, true])
        button(scale, `${which} ${log ? "log" : "linear"}`, () => state.log[state.at] === log, () => { if (axes[state.at].log !== null) state.log[state.at] = log; });
    }
    refreshers.forEach((f) => f());
    if (this.frames > 1) this.slider(bar);
  }

  slider(bar) {
    const label = element("label", bar, { className: "slider" });
    const range = element("input", label, { type: "range", min: 0, max: this.frames - 1, value: this.state.frame });
    const name = element("output", label, { textContent: this.spec.frames[this.state.frame] });
    range.oninput = () => {
      this.state.frame = Number(range.value);
      name.textContent = this.spec.frames[this.state.frame];
      this.changed();
    };
  }

  legend(bar) {
    this.groups = [...new Set(this.spec.series.map((s) => s.group))];
    this.chips = [];
    if (this.spec.scale) this.scale(bar);
    if (!this.spec.legend) return;
    for (const group of this.groups) {
      const b = element("button", bar, { type: "button", title: "click: show or hide; double click: this one alone" });
      const swatch = element("i", b);
      element("span", b, { textContent: group });
      const first = this.spec.series.find((s) => s.group === group);
      this.chips.push(() => {
        swatch.style.background = Array.isArray(first.colour) ? SCALE : colour(first.colour);
        b.setAttribute("aria-pressed", !this.state.hidden.includes(group));
      });
      b.onclick = () => {
        const { hidden } = this.state;
        this.state.hidden = hidden.includes(group) ? hidden.filter((g) => g !== group) : [...hidden, group];
        this.changed();
      };
      b.ondblclick = () => {
        const others = this.groups.filter((g) => g !== group);
        const alone = others.every((g) => this.state.hidden.includes(g)) && !this.state.hidden.includes(group);
        this.state.hidden = alone ? [] : others;
        this.changed();
      };
    }
  }

  scale(bar) { // of points that have a colour each
    const [title, low, high] = this.spec.scale, shown = element("span", bar, { className: "scale" });
    element("span", shown, { textContent: `${title} ${low}` });
    element("i", shown).style.background = SCALE;
    element("span", shown, { textContent: high });
  }

  traces() {
    const x = this.axis("x"), y = this.axis("y"), found = [];
    for (const s of this.spec.series) {
      const X = s.values[x.key], Y = s.values[y.key];
      if (!X || !Y || (s.frame !== null && s.frame !== this.state.frame)) continue;
      const tint = Array.isArray(s.colour) ? s.colour.map(colour) : colour(s.colour);
      const common = { legendgroup: s.group, name: s.group, showlegend: false, visible: !this.state.hidden.includes(s.group) };
      const isWords = s.style === "words", isPoints = isWords || s.style === "points" || s.style === "rings";
      const bars = (key) => s.low[key] && { type: "data", symmetric: false, color: tint, thickness: 2, width: 0,
        array: s.high[key].map((h, i) => h - s.values[key][i]), arrayminus: s.low[key].map((l, i) => s.values[key][i] - l) };
      if (!isPoints && s.low[y.key])
        found.push({ ...common, x: [...X, ...[...X].reverse()], y: [...s.high[y.key], ...[...s.low[y.key]].reverse()], type: "scatter",
          mode: "lines", fill: "toself", fillcolor: faint(tint, 0.18), line: { width: 0 }, hoverinfo: "skip" });
      found.push({
        ...common, x: X, y: Y, type: "scatter", mode: isWords ? "markers+text" : isPoints ? "markers" : X.length > 1 ? "lines" : "markers",
        line: { color: Array.isArray(tint) ? tint[0] : tint, width: s.style === "thin" ? 0.8 : 2, dash: s.style === "dashed" ? "dash" : "solid" },
        opacity: s.style === "thin" ? 0.5 : 1,
        marker: { color: tint, size: s.style === "rings" ? 13 : isWords ? 10 : 7, ...(isWords ? { line: { width: 2, color: css("--card") } } : {}), symbol: s.style === "rings" ? "circle-open" : "circle" },
        ...(isPoints ? { error_x: bars(x.key) || undefined, error_y: bars(y.key) || undefined } : {}),
        ...(isWords ? { textposition: "top center", textfont: { color: css("--ink"), size: 13 } } : {}),
        text: s.hover, hovertemplate: `%{text}${x.words ? "" : "<br>%{x:.4~g} " + x.short}${y.words ? "" : "<br>%{y:.5~g} " + y.short}<extra></extra>`,
      });
    }
    return found;
  }

  draw() {
    this.chips.forEach((f) => f());
    const narrow = this.plot.clientWidth < PHONE;
    const line = css("--line"), layoutOf = (which) => {
      const a = this.axis(which), state = this.state[which], log = state.log[state.at] && !a.words;
      const range = a.range && (log ? (a.range[0] > 0 ? a.range.map(Math.log10) : null) : a.range);
      return { title: { text: a.words ? "" : narrow ? a.short : a.title, standoff: 8 }, type: a.words ? "category" : log ? "log" : "linear", gridcolor: line,
        zerolinecolor: css("--muted"), linecolor: line, automargin: true, tickformat: a.words ? "" : a.si ? "~s" : ".4~g", ...(which === "x" && (log || narrow) ? { nticks: log ? 4 : 5 } : {}) /* of a decade 1, 2, 5: all nine overlap */,
        ...(a.words ? { autorange: "reversed", ...(a.order.length ? { categoryorder: "array", categoryarray: a.order } : {}), tickfont: { size: narrow ? 10 : 12 } } : range ? { range } : {}) };
    };
    Plotly.react(this.plot, this.traces(), {
      height: this.spec.height, margin: { l: 52, r: 14, t: 10, b: 46 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--ink"), family: "inherit", size: 12 }, hovermode: "closest", dragmode: narrow ? false : "zoom",
      hoverlabel: { align: "left", bgcolor: css("--card"), bordercolor: line, font: { color: css("--ink") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--accent") },
      xaxis: layoutOf("x"), yaxis: layoutOf("y"), uirevision: JSON.stringify([this.state.x, this.state.y]), // a closer look outlives the next frame
    }, { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover", modeBarButtons: [[image("png", "camera"), image("svg", "disk"), "autoScale2d"]] });
  }
}

class Maps { // a small picture of every head, and one of them large
  constructor(card) {
    this.spec = JSON.parse(card.querySelector("script").textContent);
    this.key = `${location.pathname}#${card.querySelector("h3").textContent}`;
    this.state = { layer: 0, head: 0, ...JSON.parse(kept(sessionStorage, this.key) || "{}") };
    this.plot = card.querySelector(".plot");
    this.said = card.querySelector(".shown");
    this.pictures = [];
    const grid = card.querySelector(".grid"), { layers, heads } = this.spec;
    grid.style.gridTemplateColumns = `auto repeat(${heads.length}, minmax(2.7rem, 6.5rem))`;
    element("span", grid);
    for (const head of heads) element("span", grid, { textContent: `head ${head}` });
    layers.forEach((name, layer) => {
      element("span", grid, { textContent: `layer ${name}` });
      heads.forEach((_, head) => this.pictures.push(this.picture(grid, layer, head)));
    });
    this.draw();
  }

  weight(layer, head, query, key) { return this.spec.weights[layer][head][query * (query + 1) / 2 + key] / this.spec.units; }
  named(layer, head) { return `layer ${this.spec.layers[layer]}, head ${this.spec.heads[head]}`; }

  picture(grid, layer, head) {
    const n = this.spec.words.length, b = element("button", grid, { type: "button", title: this.named(layer, head) });
    const canvas = element("canvas", b, { width: n, height: n });
    b.onclick = () => {
      Object.assign(this.state, { layer, head });
      kept(sessionStorage, this.key, JSON.stringify(this.state));
      this.draw();
    };
    return { b, layer, head, pen: canvas.getContext("2d") };
  }

  paint({ b, layer, head, pen }) {
    const n = this.spec.words.length, image = pen.createImageData(n, n), [low, high] = this.ends;
    for (let query = 0; query < n; query++)
      for (let key = 0; key <= query; key++) {
        const shade = Math.sqrt(this.weight(layer, head, query, key));
        image.data.set([...low.map((x, i) => x + shade * (high[i] - x)), 255], 4 * (query * n + key));
      }
    pen.putImageData(image, 0, 0);
    b.setAttribute("aria-pressed", layer === this.state.layer && head === this.state.head);
  }

  draw() {
    this.state.layer = Math.min(this.state.layer, this.spec.layers.length - 1);
    this.state.head = Math.min(this.state.head, this.spec.heads.length - 1);
    const { words } = this.spec, { layer, head } = this.state, n = words.length, at = words.map((_, i) => i);
    this.ends = [parts(css("--empty")), parts(css("--accent"))];
    this.pictures.forEach((p) => this.paint(p));
    this.said.textContent = `${this.named(layer, head)}: rows attend to columns`;
    this.plot.setAttribute("aria-label", `Attention in ${this.named(layer, head)}`);
    const narrow = innerWidth < PHONE;
    const shades = [0, 0.25, 0.5, 0.75, 1].map((s) => [s * s, `rgb(${this.ends[0].map((x, i) => Math.round(x + s * (this.ends[1][i] - x))).join(",")})`]);
    const axis = { tickvals: at, ticktext: this.spec.ticks, showgrid: false, zeroline: false, automargin: true, fixedrange: true, ticks: "",
      tickfont: { size: Math.max(7, Math.min(13, Math.floor((narrow ? 210 : 360) / n))) } };
    Plotly.react(this.plot, [{
      type: "heatmap", zmin: 0, zmax: 1, colorscale: shades, hoverongaps: false, xgap: 1, ygap: 1,
      z: at.map((query) => at.map((key) => (key <= query ? this.weight(layer, head, query, key) : null))),
      text: at.map((query) => at.map((key) => `${words[query]} attends to ${words[key]}`)),
      hovertemplate: "%{text}<br>%{z:.4f}<extra></extra>",
      colorbar: { thickness: 10, len: 0.6, outlinewidth: 0, tickfont: { color: css("--quiet") } }, showscale: this.plot.clientWidth > PHONE,
    }], {
      height: narrow ? 400 : 480, margin: { l: 20, r: 10, t: 6, b: 20 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--ink"), family: "inherit", size: 12 }, dragmode: false,
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
      xaxis: { ...axis, tickangle: -90 }, yaxis: { ...axis, autorange: "reversed" },
    }, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

const theme = document.getElementById("theme");
const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
const saved = kept(localStorage, "theme");
if (saved) root.dataset.theme = saved;
const charts = [...document.querySelectorAll(".chart, .maps")].flatMap((card) => {
  try {
    return [new (card.classList.contains("maps") ? Maps : Chart)(card)];
  } catch (error) { // the rest of the page stands
    console.error(error);
    card.querySelector(".plot").replaceChildren(element("p", card, { className: "note", textContent: "This chart could not be drawn." }));
    return [];
  }
});
const repaint = () => { theme.textContent = dark() ? "light" : "dark"; charts.forEach((c) => c.draw()); };
theme.textContent = dark() ? "light" : "dark";
theme.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; kept(localStorage, "theme", root.dataset.theme); repaint(); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
