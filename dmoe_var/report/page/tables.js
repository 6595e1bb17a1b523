// Tables of the points, of one point by scale and part, and of the stages' records.

function drawPoints(quality, choose) {
  const dense = quality.curves.flatMap((curve) => curve.rows).find((row) => row.dense);
  const rows = quality.curves.flatMap((curve) =>
    curve.rows.map((row) => [
      curve.name,
      row.tau || "–",
      digits(row.gmac),
      dense ? change(row.gmac / dense.gmac - 1) : "–",
      row.fid.toFixed(2) + (row.seeds > 1 ? ` ± ${digits(row.fid_std, 2)}` : ""),
      dense ? change(row.fid / dense.fid - 1, 2) : "–",
      row.agreement === null ? "–" : percent(row.agreement),
      make("a", { href: "#images", click: () => choose(row) }, "images"),
    ]),
  );
  const heads = ["curve", "tau", "GMAC", "against dense", quality.fid_name, "against dense", "right digit", ""];
  const used = rows.some((cells) => cells[6] !== "–") ? heads.map((_, i) => i) : [0, 1, 2, 3, 4, 5, 7];
  byId("points").replaceChildren(table(used.map((i) => heads[i]), rows.map((cells) => used.map((i) => cells[i]))));
}

function drawGrid(id, row) {
  const image = byId(id);
  image.hidden = !row?.grid;
  if (row?.grid) {
    image.src = row.grid;
    image.classList.toggle("crisp", row.grid.startsWith("data:image/png"));
  }
  byId(`${id}-caption`).textContent = row ? `${row.dense ? "dense VAR" : `tau ${row.tau}`}: ${row.grid_note}` : "no such point was measured";
}

function drawCosts(row, dense, quality, about) {
  const heads = ["scale", "tokens", "dense", "here", "change", "experts run"];
  const rows = row.scales.map((scale, si) => {
    const before = dense?.scales[si]?.gmac ?? null;
    return [
      `${si + 1}`,
      `${about.patch_nums[si]} × ${about.patch_nums[si]}`,
      digits(before), digits(scale.gmac),
      before ? change(scale.gmac / before - 1) : "–",
      scale.share === null ? "dense FFN" : bar(scale.share),
    ];
  });
  const total = ["all", "", digits(dense?.gmac ?? null), digits(row.gmac), dense ? change(row.gmac / dense.gmac - 1) : "–", ""];
  byId("by-scale").replaceChildren(
    rows.length ? table(heads, rows, total) : make("p", { class: "quiet" }, "The record of this point is gone, so its cost by scale is unknown."),
  );
  const parts = quality.parts
    .map((part, i) => [part.replace("qkv_proj", "qkv + proj").replace("ffn", "dense FFN"), dense?.parts[i] ?? null, row.parts[i]])
    .filter(([, before, now]) => before || now);
  byId("by-part").replaceChildren(
    rows.length ? table(["part", "dense", "here"], parts.map(([name, before, now]) => [name, digits(before), digits(now)])) : "",
  );
}

const STATES = { present: "present", missing: "missing", given: "given", "made otherwise": "otherwise" };

function drawStages(stages) {
  const absent = stages.filter((stage) => stage.state === "missing" || stage.state === "made otherwise");
  byId("missing").textContent = absent.length
    ? `No record of this configuration: ${absent.map((stage) => stage.name).join(", ")}. What they would tell is not in this page.`
    : "Every stage has its record.";
  byId("stages").replaceChildren(...stages.map((stage) =>
    make("div", { class: "stage", id: `stage-${stage.name}` },
      make("p", {},
        make("span", { class: `state ${STATES[stage.state]}` }, stage.state), make("code", {}, stage.name), " ",
        make("span", { class: "quiet" }, stage.note || (stage.records.length > 1 ? `${stage.records.length} records` : "")),
      ),
      ...drawRecords(stage.records),
    )));
}

/** Each record to unfold; where there are many, all of them together first. */
function drawRecords(records) {
  const drawn = records.map(drawRecord);
  if (drawn.length <= 4) return drawn;
  return [make("details", { class: "many" }, make("summary", {}, `all ${drawn.length}`), ...drawn)];
}

function drawRecord(record) {
  const names = Object.keys(record.metrics);
  const made = [
    record.ended.replace("T", " ").replace("+00:00", " UTC"), record.device, record.dtype,
    `seed ${record.seed}`, `${record.num_samples} samples`, `commit ${record.git_commit.slice(0, 10)}`,
  ].join(" · ");
  return make("details", {},
    make("summary", {}, `${record.variant} (${names.length} numbers)`),
    make("p", { class: "quiet" }, made),
    make("div", { class: "scroll" }, table(["metric", "value"], names.map((name) => [name, digits(record.metrics[name], 5)]))),
  );
}
