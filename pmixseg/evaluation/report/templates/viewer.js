"use strict";
(() => {
  const root = document.getElementById("viewer");
  const data = JSON.parse(document.getElementById("volumes").textContent);
  const form = root.querySelector("form");
  const status = root.querySelector("[role=status]");
  const field = (name) => form.elements.namedItem(name);
  if (typeof DecompressionStream === "undefined") return;
  root.hidden = false;

  const unpacked = new Map();
  async function unpack(text) {
    if (text === null) return null;
    if (!unpacked.has(text)) {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      unpacked.set(text, new Uint8Array(await new Response(stream).arrayBuffer()));
    }
    return unpacked.get(text);
  }

  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const classColours = data.colours.map(rgb);
  const errorColours = data.errors.map(rgb);

  function fill(select, entries) {
    const before = select.value;
    select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
    if (entries.some(([value]) => value === before)) select.value = before;
    select.closest("label").hidden = entries.length < 2;
  }

  const named = (combination) => combination.split("+").map((m) => data.names[m] || m).join(" + ");
  const chosen = () => data.cases[Number(field("case").value)];
  const chosenRun = () => chosen().runs[Number(field("run").value)];

  function chooseCase() {
    const one = chosen();
    fill(field("run"), one.runs.map((r, i) => [String(i), r.run]));
    fill(field("modality"), one.modalities.map((m) => [m, data.names[m] || m]));
    chooseRun();
    choosePlane();
  }

  function chooseRun() {
    const list = [...chosenRun().combinations];
    list.sort((a, b) => b.split("+").length - a.split("+").length);
    fill(field("combination"), list.map((c) => [c, named(c)]));
  }

  function choosePlane() {
    const size = chosen().shape[Number(field("plane").value)];
    field("slice").max = String(size - 1);
    field("slice").value = String(busiest());
  }

  // The slice with most labelled voxels, of the truth or else of the prediction.
  let labels = null;
  function busiest() {
    const axis = Number(field("plane").value);
    const [d, h, w] = chosen().shape;
    const counts = new Array([d, h, w][axis]).fill(0);
    if (labels) {
      for (let i = 0, x = 0; x < d; x++) for (let y = 0; y < h; y++) for (let z = 0; z < w; z++, i++) {
        if (labels[i]) counts[[x, y, z][axis]]++;
      }
    }
    const best = Math.max(...counts);
    return best ? counts.indexOf(best) : counts.length >> 1;
  }

  // Columns and rows of a plane; axes run right, anterior, superior, pictures are radiological.
  function layout(axis) {
    const [d, h, w] = chosen().shape;
    const [sx, sy, sz] = chosen().spacing;
    if (axis === 2) return { cols: d, rows: h, size: [d * sx, h * sy], at: (c, r, s) => ((d - 1 - c) * h + (h - 1 - r)) * w + s };
    if (axis === 1) return { cols: d, rows: w, size: [d * sx, w * sz], at: (c, r, s) => ((d - 1 - c) * h + s) * w + (w - 1 - r) };
    return { cols: h, rows: w, size: [h * sy, w * sz], at: (c, r, s) => (s * h + (h - 1 - c)) * w + (w - 1 - r) };
  }

  function paint(layer, view, slice, grey, kinds, colours, alpha) {
    const canvas = root.querySelector(`canvas[data-layer=${layer}]`);
    canvas.closest("figure").hidden = kinds === null && layer !== "image";
    canvas.width = view.cols;
    canvas.height = view.rows;
    canvas.style.aspectRatio = `${view.size[0]} / ${view.size[1]}`;
    const context = canvas.getContext("2d");
    const picture = context.createImageData(view.cols, view.rows);
    for (let r = 0, p = 0; r < view.rows; r++) for (let c = 0; c < view.cols; c++, p += 4) {
      const voxel = view.at(c, r, slice);
      const kind = kinds ? kinds(voxel) : 0;
      for (let k = 0; k < 3; k++) {
        const base = grey[voxel];
        picture.data[p + k] = kind ? base + alpha * (colours[(kind - 1) % colours.length][k] - base) : base;
      }
      picture.data[p + 3] = 255;
    }
    context.putImageData(picture, 0, 0);
  }

  async function draw() {
    const one = chosen(), run = chosenRun();
    const volume = one.shape.reduce((a, b) => a * b, 1);
    const [image, truth, all] = await Promise.all([one.image, one.truth, run.predictions].map(unpack));
    if (one !== chosen() || run !== chosenRun()) return;
    const combination = field("combination").value;
    const k = run.combinations.indexOf(combination);
    const prediction = all.subarray(k * volume, (k + 1) * volume);
    if (labels !== (truth || prediction)) {
      const first = labels === null || labels.owner !== one;
      labels = truth || prediction;
      labels.owner = one;
      if (first) field("slice").value = String(busiest());
    }
    const m = one.modalities.indexOf(field("modality").value);
    const grey = image.subarray(m * volume, (m + 1) * volume);
    const axis = Number(field("plane").value);
    const slice = Number(field("slice").value);
    const view = layout(axis);
    const alpha = Number(field("opacity").value) / 100;
    const wrong = (v) => {
      const t = truth[v], p = prediction[v];
      return t === p ? 0 : p === 0 ? 1 : t === 0 ? 2 : 3;
    };
    paint("image", view, slice, grey, null, [], 0);
    paint("truth", view, slice, grey, truth && ((v) => truth[v]), classColours, alpha);
    paint("prediction", view, slice, grey, (v) => prediction[v], classColours, alpha);
    paint("error", view, slice, grey, truth && wrong, errorColours, Math.max(alpha, 0.3));
    field("where").value = `${slice + 1} / ${one.shape[axis]}`;
    const hidden = !combination.split("+").includes(field("modality").value);
    const side = axis === 0 ? "anterior is on the left" : "the patient’s right is on the left";
    status.textContent = `Voxels of ${one.spacing.map((s) => s.toFixed(1)).join(" × ")} mm; ${side}.` +
      (hidden ? " The network did not see the image that is displayed." : "");
  }

  fill(field("case"), data.cases.map((c, i) => [String(i), c.case]));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.name === "case") chooseCase();
    if (event.target.name === "run") chooseRun();
    if (event.target.name === "plane") choosePlane();
    draw();
  });
  chooseCase();
  draw();
})();
