// The router microscope: Eq. 3 at any tau, live, on the scores that were stored with the picture.

const STEPS = 65535; // a stored ratio of 1
const GAIN = 4; // of shown differences between pictures

/** One stored picture: by scale, counts and errors for any tau. Scales hold layers x branches x tokens x experts. */
class Picture {
  constructor(stored, about) {
    this.stored = stored;
    this.layers = about.depth;
    this.experts = about.num_experts;
    this.scales = new Map(about.moe_scales.map((si) => [si, this.scale(si, about.patch_nums[si])]));
    this.counted = new Map();
  }

  scale(si, side) {
    const { ratios, errors, after } = this.stored;
    const tokens = side ** 2;
    const numbers = numbers16(ratios[si]);
    const branches = numbers.length / (this.layers * tokens * this.experts); // 1 where guidance has ended
    return { side, tokens, branches, ratios: numbers, errors: numbers16(errors[si]), after: after[si] };
  }

  /** Experts that run on each (layer, branch, token): score >= tau x largest score (Eq. 3). */
  counts(si, tau) {
    const known = this.counted.get(si);
    if (known?.tau === tau) return known.counts;
    const { ratios } = this.scales.get(si);
    const counts = new Uint16Array(ratios.length / this.experts);
    const least = tau * STEPS;
    for (let i = 0; i < ratios.length; i += 1) {
      if (ratios[i] >= least) counts[Math.floor(i / this.experts)] += 1;
    }
    this.counted.set(si, { tau, counts });
    return counts;
  }

  pairs(si, tau) {
    return this.counts(si, tau).reduce((sum, count) => sum + count, 0);
  }

  share(si, tau) {
    return this.pairs(si, tau) / this.scales.get(si).ratios.length;
  }

  /** Index of the first (layer, branch, token) of a map. */
  start(si, layer, branch) {
    const { branches, tokens } = this.scales.get(si);
    return (layer * branches + Math.min(branch, branches - 1)) * tokens;
  }

  /** Relative error of the FFN's output on one (layer, branch, token) at a tau. */
  error(si, tau, at) {
    const count = this.counts(si, tau)[at];
    return this.scales.get(si).errors[at * this.experts + count - 1] * this.stored.error_step;
  }

  /** By token: experts that run and relative error, of one layer or as means over all (layer null). */
  map(si, tau, layer, branch) {
    const { tokens } = this.scales.get(si);
    const layers = layer === null ? Array.from({ length: this.layers }, (_, i) => i) : [layer];
    const counts = this.counts(si, tau);
    const over = (value) => Array.from({ length: tokens }, (_, token) =>
      layers.reduce((sum, each) => sum + value(this.start(si, each, branch) + token), 0) / layers.length);
    return { experts: over((at) => counts[at]), errors: over((at) => this.error(si, tau, at)) };
  }

  /** Scores of one token's experts, as shares of the largest, and which of them run. */
  scores(si, tau, layer, branch, token) {
    const first = (this.start(si, layer, branch) + token) * this.experts;
    const ratios = [...this.scales.get(si).ratios.subarray(first, first + this.experts)];
    return ratios.map((ratio) => ({ share: ratio / STEPS, runs: ratio >= tau * STEPS }));
  }
}

function average(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

class Microscope {
  constructor(data) {
    this.about = data.about;
    this.costs = data.microscope;
    this.scales = data.about.moe_scales;
    this.pictures = this.costs.pictures.map((stored) => new Picture(stored, data.about));
    const first = this.costs.chosen[0];
    this.state = {
      picture: 0, si: this.scales.at(-1), layer: null, branch: 0, token: 0, opacity: 0.8, together: false, stretch: true,
      tau: new Map(this.scales.map((si, i) => [si, this.costs.chosen[i]])),
      drawn: this.nearest(first),
    };
    this.state.together = new Set(this.costs.chosen).size === 1;
    this.build();
    this.update();
  }

  get picture() {
    return this.pictures[this.state.picture];
  }

  /** Which of the drawn pictures was drawn at the nearest tau. */
  nearest(tau) {
    const gaps = this.costs.tau.map((each) => Math.abs(each - tau));
    return gaps.indexOf(Math.min(...gaps));
  }

  /** GMAC of this picture: what always runs, and the experts that Eq. 3 chooses. */
  gmac() {
    return this.scales.reduce(
      (sum, si) => sum + this.costs.pair_gmac[si] * this.picture.pairs(si, this.state.tau.get(si)),
      this.costs.fixed_gmac,
    );
  }

  set(changes) {
    Object.assign(this.state, changes);
    const { tokens } = this.picture.scales.get(this.state.si);
    this.state.token = Math.min(this.state.token, tokens - 1);
    this.update();
  }

  setTau(tau) {
    for (const si of this.state.together ? this.scales : [this.state.si]) this.state.tau.set(si, tau);
    this.set({ drawn: this.nearest(tau) });
  }

  setEach(taus) {
    this.scales.forEach((si, i) => this.state.tau.set(si, taus[i]));
    this.set({ drawn: this.nearest(average(taus)), together: new Set(taus).size === 1 });
  }

  build() {
    byId("microscope-body").replaceChildren(
      this.controls(), make("dl", { class: "readouts", "aria-live": "polite", id: "readouts" }),
      make("div", { class: "panels", id: "panels" }), this.below(),
    );
    this.panels();
  }

  choices(name, title, entries, chosen, choose, kind = "") {
    const labels = entries.map(([value, ...content]) =>
      make("label", {},
        make("input", { type: "radio", name, value, checked: value === chosen, change: () => choose(value) }),
        ...content));
    return make("fieldset", {}, make("legend", {}, title), make("div", { class: `choices ${kind}` }, ...labels));
  }

  controls() {
    const { state } = this;
    const pictures = this.pictures.map(({ stored }, i) => [
      i, make("img", { src: stored.drawn[0].image, alt: "", class: "crisp" }), stored.name,
    ]);
    const branches = ["conditional", "unconditional"].slice(0, this.costs.branches).map((name, i) => [i, name]);
    const layer = make("select", { id: "layer", change: (event) => this.set({ layer: event.target.value === "all" ? null : Number(event.target.value) }) },
      make("option", { value: "all" }, "all (mean)"),
      ...Array.from({ length: this.about.depth }, (_, i) => make("option", { value: i }, `${i + 1}`)));
    return make("div", { class: "controls" },
      this.choices("picture", "Picture", pictures, state.picture, (picture) => this.set({ picture }), "pictures"),
      this.choices("scale", "Scale", this.scales.map((si) => [si, `${si + 1}`]), state.si, (si) => this.set({ si })),
      make("label", {}, make("span", {}, "Layer"), layer),
      this.choices("branch", "Branch", branches, state.branch, (branch) => this.set({ branch })),
      this.tauControl());
  }

  tauControl() {
    const slider = make("input", {
      type: "range", id: "tau", min: 0, max: 1, step: 0.005, "aria-describedby": "tau-note",
      input: (event) => this.setTau(Number(event.target.value)),
    });
    const together = make("input", { type: "checkbox", id: "together", change: (event) => {
      this.state.together = event.target.checked;
      if (event.target.checked) this.setTau(this.state.tau.get(this.state.si));
      else this.update();
    } });
    return make("div", { class: "tau" },
      make("label", { for: "tau" }, make("span", {}, "tau: an expert runs where its score is at least tau × the token's largest")),
      slider,
      make("div", { class: "row", id: "tau-note" },
        make("output", { id: "tau-shown", for: "tau" }),
        make("label", {}, together, " same at all sparse scales"),
        make("button", { type: "button", id: "chosen-tau", click: () => this.setEach(this.costs.chosen) }, "operating point"),
        make("button", { type: "button", click: () => this.setEach(this.scales.map(() => 0)) }, "all experts")));
  }

  panels() {
    const canvas = (id, name) => {
      const element = make("canvas", { id, width: 512, height: 512, tabindex: 0, role: "img", "aria-label": `${name}; arrow keys move the token` });
      element.addEventListener("pointermove", (event) => this.point(event));
      element.addEventListener("pointerdown", (event) => this.point(event));
      element.addEventListener("keydown", (event) => this.move(event));
      return element;
    };
    const opacity = make("input", { type: "range", id: "opacity", min: 0, max: 1, step: 0.05, value: this.state.opacity, input: (event) => this.set({ opacity: Number(event.target.value) }) });
    const stretch = make("input", { type: "checkbox", id: "stretch", checked: this.state.stretch, change: (event) => this.set({ stretch: event.target.checked }) });
    byId("panels").append(
      make("figure", {}, make("h3", { id: "after-title" }), make("img", { id: "after", class: "crisp", alt: "The picture decoded after this scale" }),
        make("label", { class: "ramp" }, "maps over picture", opacity),
        make("label", { class: "ramp" }, stretch, "stretch colours to what a map holds")),
      make("figure", {}, make("h3", {}, "Experts per token"), canvas("experts-map", "Experts per token"), make("div", { id: "experts-ramp" })),
      make("figure", {}, make("h3", {}, "Error of the FFN against all experts"), canvas("error-map", "Relative error per token"), make("div", { id: "error-ramp" })),
    );
  }

  below() {
    const part = (title, note, ...content) => make("div", {}, make("h3", {}, title), note ? make("p", { class: "quiet" }, note) : null, ...content);
    return make("div", {},
      make("div", { class: "below" },
        part("Scores of one token", null, make("p", { class: "quiet", id: "token-about" }), make("div", { id: "token" })),
        part("Mean experts a token, by scale and layer", "Both branches; choose a cell to look at it.", make("div", { class: "scroll matrix", id: "matrix" }))),
      make("div", { class: "wide" },
        part("Drawn again at each tau", "From the same random stream, one tau on all sparse scales; cost and experts as they were counted then. Choose one to compare it with the dense model's picture.",
          make("div", { class: "strip", id: "strip" }), make("div", { class: "compare", id: "compare" }))));
  }

  point(event) {
    const box = event.target.getBoundingClientRect();
    const { side } = this.picture.scales.get(this.state.si);
    const cell = (at, length) => Math.min(side - 1, Math.max(0, Math.floor((at / length) * side)));
    const token = cell(event.clientY - box.top, box.height) * side + cell(event.clientX - box.left, box.width);
    if (token !== this.state.token) this.set({ token });
  }

  move(event) {
    const { side } = this.picture.scales.get(this.state.si);
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const [down, right] = steps[event.key];
    const row = Math.floor(this.state.token / side) + down;
    const column = (this.state.token % side) + right;
    if (row < 0 || column < 0 || row >= side || column >= side) return;
    this.set({ token: row * side + column });
  }

  update() {
    const { si, layer, branch } = this.state;
    const tau = this.state.tau.get(si);
    const map = this.picture.map(si, tau, layer, branch);
    byId("tau").value = tau;
    byId("tau-shown").textContent = this.scales.length > 1 && !this.state.together
      ? `scale ${si + 1}: ${digitsOfTau(tau)} (${this.scales.map((each) => digitsOfTau(this.state.tau.get(each))).join(", ")})`
      : digitsOfTau(tau);
    byId("together").checked = this.state.together;
    byId("layer").value = layer === null ? "all" : layer;
    for (const [name, value] of [["picture", this.state.picture], ["scale", si], ["branch", branch]]) {
      document.querySelector(`input[name=${name}][value="${value}"]`).checked = true;
    }
    this.showReadouts(map, tau);
    this.showMaps(map);
    this.showToken(tau);
    this.showMatrix();
    this.showStrip();
  }

  showReadouts(map, tau) {
    const { si, layer, branch } = this.state;
    const gmac = this.gmac();
    const where = `scale ${si + 1}, ${layer === null ? "mean of layers" : `layer ${layer + 1}`}, ${["conditional", "unconditional"][Math.min(branch, this.picture.scales.get(si).branches - 1)]}`;
    const experts = average(map.experts);
    const error = average(map.errors);
    const share = this.picture.share(si, tau);
    const entries = [
      ["experts", "Experts a token", digits(experts, 3), `of ${this.about.num_experts}; ${where}`, experts],
      ["error", "Error of the FFN output", percent(error), "mean of the tokens shown", error],
      ["share", "Expert work at this scale", percent(share), "all layers and branches", share],
      ["gmac", "Cost of this picture", `${digits(gmac)} GMAC`, `${change(gmac / this.costs.dense_gmac - 1)} against dense ${digits(this.costs.dense_gmac)}`, gmac],
    ];
    byId("readouts").replaceChildren(...entries.map(([id, name, shown, note, value]) =>
      make("div", {}, make("dt", {}, name), make("dd", { id: `read-${id}`, "data-value": value }, shown, make("small", {}, note)))));
  }

  showMaps(map) {
    const scale = this.picture.scales.get(this.state.si);
    byId("after-title").textContent = `Picture after scale ${this.state.si + 1}`;
    byId("after").src = scale.after;
    this.paint("experts", scale, map.experts, this.about.num_experts, (count) => (Number.isInteger(count) ? `${count}` : digits(count, count < 10 ? 2 : 3)), " experts");
    this.paint("error", scale, map.errors, 1, (error) => `${Math.round(100 * error)}`, " %");
  }

  /** Cells over the picture, coloured from 0 to `most` or over what there is. The picture is loaded once; numbers are written where they fit. */
  paint(name, scale, values, most, text, unit) {
    const range = [Math.min(...values), Math.max(...values)];
    const [low, high] = this.state.stretch && range[0] < range[1] ? range : [0, most];
    byId(`${name}-ramp`).replaceChildren(rampBar(text(low), text(high) + unit));
    const canvas = byId(`${name}-map`);
    const image = (scale.image ??= Object.assign(new Image(), { src: scale.after }));
    if (!image.complete) {
      image.onload = () => this.update();
      return;
    }
    const context = canvas.getContext("2d");
    const size = canvas.width / scale.side;
    context.imageSmoothingEnabled = false;
    context.globalAlpha = 1;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    context.font = `${Math.round(Math.min(20, size / 2.6))}px system-ui, "DejaVu Sans", sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    values.forEach((value, token) => {
      const [left, top] = [(token % scale.side) * size, Math.floor(token / scale.side) * size];
      const colour = rampColour((value - low) / (high - low));
      context.fillStyle = css(colour, this.state.opacity);
      context.fillRect(left, top, size + 0.5, size + 0.5);
      if (size < 30 || this.state.opacity < 0.5) return;
      context.fillStyle = inkOn(colour);
      context.fillText(text(value), left + size / 2, top + size / 2);
    });
    const [column, row] = [this.state.token % scale.side, Math.floor(this.state.token / scale.side)];
    context.lineWidth = 5;
    context.strokeStyle = "#000000";
    context.strokeRect(column * size + 1, row * size + 1, size - 2, size - 2);
    context.lineWidth = 2.5;
    context.strokeStyle = "#ffffff";
    context.strokeRect(column * size + 1, row * size + 1, size - 2, size - 2);
  }

  /** Bars of the experts' scores, and the threshold. */
  showToken(tau) {
    const { si, branch, token } = this.state;
    const layer = this.state.layer ?? 0;
    const scores = this.picture.scores(si, tau, layer, branch, token);
    const { side } = this.picture.scales.get(si);
    const chosen = scores.filter(({ runs }) => runs).length;
    const error = this.picture.error(si, tau, this.picture.start(si, layer, branch) + token);
    byId("token-about").textContent =
      `Row ${Math.floor(token / side) + 1}, column ${(token % side) + 1}, layer ${layer + 1}: ${chosen} of ${scores.length} experts run, error ${percent(error)}. Scores are shares of the token's largest.`;
    const [width, height, left, bottom] = [480, 190, 40, 26];
    const step = (width - left) / scores.length;
    const y = (score) => 8 + (1 - score) * (height - bottom - 8);
    const every = Math.ceil(scores.length / 16);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Scores of the experts" },
      ...[0, 0.5, 1].map((value) => draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, `${value}`)),
      ...scores.flatMap(({ share, runs }, e) => [
        draw("rect", { class: runs ? "runs" : "idle", x: left + e * step + 1, width: Math.max(1, step - 2), y: y(share), height: Math.max(1, y(0) - y(share)) },
          draw("title", {}, `expert ${e + 1}: ${digits(share, 3)}`)),
        e % every === 0 ? draw("text", { x: left + (e + 0.5) * step, y: height - 8, "text-anchor": "middle" }, `${e + 1}`) : "",
      ]),
      draw("line", { class: "threshold", x1: left, x2: width, y1: y(tau), y2: y(tau) }),
      draw("text", { class: "threshold-name", x: width - 2, y: y(tau) < 24 ? y(tau) + 16 : y(tau) - 5, "text-anchor": "end" }, `tau ${digitsOfTau(tau)}`));
    byId("token").replaceChildren(svg);
  }

  showMatrix() {
    const layers = Array.from({ length: this.about.depth }, (_, i) => i);
    const cell = (si, layer) => {
      const { tokens, branches } = this.picture.scales.get(si);
      const first = this.picture.start(si, layer, 0);
      const mean = average([...this.picture.counts(si, this.state.tau.get(si)).subarray(first, first + tokens * branches)]);
      const colour = rampColour(mean / this.about.num_experts);
      const button = make("button", {
        type: "button",
        "aria-label": `scale ${si + 1}, layer ${layer + 1}: ${digits(mean, 3)} experts`,
        click: () => this.set({ si, layer }),
      }, digits(mean, 3));
      button.setAttribute("aria-pressed", String(si === this.state.si && layer === this.state.layer));
      button.style.background = css(colour);
      button.style.color = inkOn(colour);
      return make("td", {}, button);
    };
    byId("matrix").replaceChildren(make("table", {},
      make("thead", {}, make("tr", {}, make("th", {}, "layer"), ...layers.map((layer) => make("th", { scope: "col" }, `${layer + 1}`)))),
      make("tbody", {}, ...this.scales.map((si) => make("tr", {}, make("th", { scope: "row" }, `scale ${si + 1}`), ...layers.map((layer) => cell(si, layer)))))));
  }

  showStrip() {
    const { stored } = this.picture;
    const entries = stored.drawn.map((drawn, i) => {
      const button = make("button", { type: "button", click: () => this.setEach(this.scales.map(() => drawn.tau)) },
        make("img", { src: drawn.image, alt: `Drawn at tau ${drawn.tau}`, class: "crisp" }), make("b", {}, `tau ${drawn.tau}`), make("br"),
        `${digits(drawn.gmac)} GMAC`, make("br"), `${percent(average(drawn.shares), 0)} of experts`);
      button.setAttribute("aria-pressed", String(i === this.state.drawn));
      return button;
    });
    byId("strip").replaceChildren(...entries);
    const drawn = stored.drawn[this.state.drawn];
    const untouched = stored.drawn.find(({ tau }) => tau === 0);
    const ofTuning = untouched
      ? ` Part of it is the fine-tuning's: tau 0, which runs every expert, differs by ${digits(untouched.difference, 3)}.`
      : "";
    const canvas = make("canvas", { id: "difference-map", width: 1, height: 1, class: "crisp", role: "img", "aria-label": "Difference of the two pictures" });
    const figure = (caption, content) => make("figure", {}, content, make("figcaption", {}, caption));
    byId("compare").replaceChildren(
      figure("dense VAR", make("img", { src: stored.dense, alt: "Drawn by the dense model", class: "crisp" })),
      figure(`tau ${drawn.tau}`, make("img", { src: drawn.image, alt: `Drawn at tau ${drawn.tau}`, class: "crisp" })),
      figure(`difference × ${GAIN}`, canvas),
      make("p", { class: "quiet", id: "difference" },
        `Mean difference ${digits(drawn.difference, 3)} of 255 levels, at the nearest tau that was drawn.${ofTuning}`));
    paintDifference(canvas, stored.dense, drawn.image);
  }
}

function digitsOfTau(tau) {
  return `${Number(tau.toFixed(5))}`;
}

async function paintDifference(canvas, ...sources) {
  const images = await Promise.all(sources.map(async (src) => {
    const image = Object.assign(new Image(), { src });
    await image.decode();
    return image;
  }));
  const { width, height } = images[0];
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const [a, b] = images.map((image) => {
    context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, width, height);
  });
  for (let i = 0; i < a.data.length; i += 1) {
    a.data[i] = i % 4 === 3 ? 255 : GAIN * Math.abs(a.data[i] - b.data[i]);
  }
  context.putImageData(a, 0, 0);
}
