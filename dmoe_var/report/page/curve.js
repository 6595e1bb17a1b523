// FID over FLOPs: an SVG whose points are links to their images.

const PLOT = { width: 920, height: 440, left: 74, right: 24, top: 18, bottom: 56 };

/** Round values that span a range, about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= raw);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return Array.from({ length: last - first + 1 }, (_, i) => ({
    value: (first + i) * step,
    text: ((first + i) * step).toFixed(places),
  }));
}

/** The outline of a marker, by matplotlib's letter. */
function marker(letter, size) {
  const polygon = (points) => `M${points.map(([x, y]) => `${(x * size).toFixed(2)},${(y * size).toFixed(2)}`).join("L")}Z`;
  const star = Array.from({ length: 10 }, (_, i) => {
    const radius = i % 2 ? 0.62 : 1.5;
    const angle = (Math.PI * (i - 2.5)) / 5;
    return [radius * Math.cos(angle), radius * Math.sin(angle)];
  });
  const plus = [[-0.35, -1], [0.35, -1], [0.35, -0.35], [1, -0.35], [1, 0.35], [0.35, 0.35], [0.35, 1], [-0.35, 1], [-0.35, 0.35], [-1, 0.35], [-1, -0.35], [-0.35, -0.35]];
  const turned = plus.map(([x, y]) => [(x - y) * 0.8, (x + y) * 0.8]);
  const shapes = {
    s: [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]],
    "^": [[0, -1.1], [1, 0.8], [-1, 0.8]],
    v: [[0, 1.1], [1, -0.8], [-1, -0.8]],
    D: [[0, -1.2], [1.2, 0], [0, 1.2], [-1.2, 0]],
    d: [[0, -1.3], [0.8, 0], [0, 1.3], [-0.8, 0]],
    P: plus, X: turned, x: turned, "*": star,
  };
  const round = `M${-size},0a${size},${size} 0 1,0 ${2 * size},0a${size},${size} 0 1,0 ${-2 * size},0Z`;
  return letter in shapes ? polygon(shapes[letter]) : round;
}

function span(values, padding) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = (high - low || Math.abs(high) || 1) * padding;
  return [low - room, high + room];
}

/** Draws the curves; calls choose(point) when one is clicked. Returns mark(point). */
function drawCurves(quality, choose) {
  const place = byId("curve");
  const rows = quality.curves.flatMap((curve) => curve.rows);
  const dense = rows.find((row) => row.dense);
  const [x0, x1] = span(rows.map((row) => row.gmac), 0.04);
  const [y0, y1] = span(rows.flatMap((row) => [row.fid - row.fid_std, row.fid + row.fid_std]), 0.06);
  const { width, height, left, right, top, bottom } = PLOT;
  const x = (gmac) => left + ((gmac - x0) / (x1 - x0)) * (width - left - right);
  const y = (fid) => height - bottom - ((fid - y0) / (y1 - y0)) * (height - top - bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${quality.fid_name} over FLOPs` });
  for (const tick of ticks(x0, x1, 7)) {
    svg.append(
      draw("line", { class: "grid", x1: x(tick.value), x2: x(tick.value), y1: top, y2: height - bottom }),
      draw("text", { x: x(tick.value), y: height - bottom + 19, "text-anchor": "middle" }, tick.text),
    );
  }
  for (const tick of ticks(y0, y1, 6)) {
    svg.append(
      draw("line", { class: "grid", x1: left, x2: width - right, y1: y(tick.value), y2: y(tick.value) }),
      draw("text", { x: left - 10, y: y(tick.value) + 4, "text-anchor": "end" }, tick.text),
    );
  }
  const middle = (top + height - bottom) / 2;
  svg.append(
    draw("text", { class: "axis-name", x: (left + width - right) / 2, y: height - 10, "text-anchor": "middle" }, "transformer GMAC an image (guidance included, decoder left out)"),
    draw("text", { class: "axis-name", transform: `translate(18 ${middle}) rotate(-90)`, "text-anchor": "middle" }, `${quality.fid_name} (lower is better)`),
  );
  const tip = make("div", { class: "tip", role: "status", hidden: true });
  const links = new Map();
  const points = draw("g");
  for (const curve of quality.curves) {
    const colour = curve.colour ?? "var(--ink)";
    const along = [...curve.rows].sort((a, b) => a.gmac - b.gmac);
    if (curve.line && along.length > 1) {
      const path = along.map((row) => `${x(row.gmac)},${y(row.fid)}`).join(" ");
      svg.append(draw("polyline", { points: path, fill: "none", stroke: colour, "stroke-width": 1.75 }));
    }
    for (const row of along) {
      const link = pointLink(row, curve, colour, x, y);
      const show = () => showTip(tip, place, link, tipLines(row, curve, quality, dense));
      fill(link, {
        pointerenter: show, focus: show,
        pointerleave: () => (tip.hidden = true), blur: () => (tip.hidden = true),
        click: () => choose(row),
      }, []);
      links.set(row.id, link);
      points.append(link);
    }
  }
  svg.append(points);
  place.replaceChildren(svg, tip);
  byId("legend").replaceChildren(...quality.curves.map(legendEntry));
  return (row) => {
    for (const [id, link] of links) {
      if (id === row.id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };
}

function pointLink(row, curve, colour, x, y) {
  const bars = row.fid_std > 0
    ? [draw("path", { d: `M${x(row.gmac)},${y(row.fid - row.fid_std)}V${y(row.fid + row.fid_std)}`, stroke: colour, "stroke-width": 1.25 })]
    : [];
  const size = row.dense || row.chosen ? 7 : 4.5;
  const place = `translate(${x(row.gmac)} ${y(row.fid)})`;
  return draw(
    "a", { href: "#images", id: row.id, tabindex: 0, "aria-label": `${curve.name}, tau ${row.tau || "none"}: ${digits(row.gmac)} GMAC, FID ${digits(row.fid)}; show its images` },
    ...bars,
    draw("circle", { class: "halo", r: size + 3.5, transform: place }),
    draw("path", { d: marker(curve.marker, size), transform: place, fill: colour, stroke: "var(--ground)", "stroke-width": 0.75 }),
  );
}

function tipLines(row, curve, quality, dense) {
  const saved = dense && !row.dense ? ` (${change(row.gmac / dense.gmac - 1)} against dense)` : "";
  const seeds = row.seeds > 1 ? ` ± ${digits(row.fid_std, 2)} over ${row.seeds} seeds` : ", one seed";
  return [
    curve.name,
    row.dense ? "no experts are selected" : `tau ${row.tau}`,
    `${digits(row.gmac)} GMAC${saved}`,
    `${quality.fid_name} ${row.fid.toFixed(2)}${seeds}`,
    "click for its images",
  ];
}

function showTip(tip, place, link, [name, ...lines]) {
  tip.replaceChildren(make("b", {}, name), ...lines.flatMap((line) => [line, make("br")]));
  tip.hidden = false;
  const box = place.getBoundingClientRect();
  const at = link.querySelector(".halo").getBoundingClientRect();
  const left = at.left - box.left + place.scrollLeft + at.width + 8;
  const fits = left + tip.offsetWidth < place.scrollLeft + box.width;
  tip.style.left = `${fits ? left : Math.max(0, left - at.width - tip.offsetWidth - 16)}px`;
  tip.style.top = `${Math.max(0, at.top - box.top - tip.offsetHeight / 2)}px`;
}

function legendEntry(curve) {
  const colour = curve.colour ?? "var(--ink)";
  const icon = draw("svg", { viewBox: "0 0 24 14", "aria-hidden": "true" });
  if (curve.line) icon.append(draw("line", { x1: 0, x2: 24, y1: 7, y2: 7, stroke: colour, "stroke-width": 1.75 }));
  icon.append(draw("path", { d: marker(curve.marker, 4.5), transform: "translate(12 7)", fill: colour }));
  return make("li", {}, icon, curve.name);
}
