// Joins the parts: what is chosen in one is shown in the others.

const data = JSON.parse(byId("data").textContent);

function main() {
  const { about, quality } = data;
  const rows = quality.curves.flatMap((curve) => curve.rows);
  const dense = rows.find((row) => row.dense);
  const first = rows.find((row) => row.chosen) ?? rows.find((row) => !row.dense) ?? dense;
  drawHead(about, quality, dense, rows.find((row) => row.chosen));
  drawStages(data.stages);
  drawMicroscope();
  if (!first) {
    byId("quality-about").textContent = "There is no evaluation of this model yet: scripts/sweep.py makes the curve.";
    for (const id of ["images", "scales"]) byId(id).hidden = true;
    return;
  }
  let mark = () => {};
  const choose = (row) => {
    mark(row);
    const name = row.dense ? "dense VAR" : `tau ${row.tau}`;
    for (const place of document.querySelectorAll(".chosen-name")) place.textContent = name;
    drawGrid("grid-dense", dense);
    drawGrid("grid-chosen", row);
    drawCosts(row, dense, quality, about);
  };
  mark = drawCurves(quality, choose);
  drawPoints(quality, choose);
  choose(first);
}

function drawHead(about, quality, dense, chosen) {
  byId("name").textContent = about.name;
  byId("about").textContent =
    `Depth ${about.depth}, width ${about.width}, ${about.num_experts} experts of ${about.expert_size} neurons at scales ${about.moe_scales.map((si) => si + 1).join(", ")} of ${about.patch_nums.length}; made ${about.made.replace("T", " ").replace("+00:00", " UTC")} at commit ${about.commit.slice(0, 10)}.`;
  const headline = byId("headline");
  headline.hidden = !(dense && chosen);
  if (dense && chosen) {
    headline.textContent =
      `At the operating point (tau ${chosen.tau}) an image costs ${digits(chosen.gmac)} GMAC, ${change(chosen.gmac / dense.gmac - 1)} against the dense model's ${digits(dense.gmac)}, at ${quality.fid_name} ${chosen.fid.toFixed(2)} against ${dense.fid.toFixed(2)} (${change(chosen.fid / dense.fid - 1, 2)}).`;
  }
  byId("quality-about").textContent =
    `${quality.num_samples} images a point and seed. Hover or tab to a point for its numbers; click it for its images and its cost by scale.`;
}

function drawMicroscope() {
  const stored = data.microscope;
  const scales = data.about.moe_scales.map((si) => si + 1).join(", ");
  const left = stored.left_out
    ? ` ${stored.left_out} more would not fit into report.max_mb=${stored.max_mb} (about ${digits(stored.picture_mb, 2)} MB each).`
    : "";
  byId("microscope-about").textContent =
    `What the routers of scales ${scales} predicted while a picture was drawn with every expert (tau 0). Every tau is applied to these scores in the page; a picture drawn at another tau gives its later tokens other inputs, so its own counts differ a little (they stand below each picture drawn). The error is the norm of what the dropped experts would have added, over the norm of the sum of all experts of that layer; "all experts" is the fine-tuned sparse model, and the shared output bias is left out of both.${left}`;
  if (stored.pictures.length) new Microscope(data);
}

main();
