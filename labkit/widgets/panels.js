// Pictures side by side, the words under them and sliders below: what every widget of labkit is drawn with.
//
//   a word under the pointer      ->  where it had the attention, over the greyed picture
//   a place under the pointer     ->  which words that place listens to, as bars and shares
//   share = low + (high - low) q / 255        q: one byte a place; low, high: one pair of float32 a map
//
//   state  {title, help, colours, tint, axes: [{name, label, values, start, maps, pictures, play}],
//           panels: [{label, alt, pictures: [[offset, length]], words: [{id, text, special}], maps: {"0,2,1": [offset, h, w]}}]}
//   blob   the JPEG pictures and the maps that the offsets speak of
//
// Both come at once and are all there is: hovering, sliding and playing ask nothing of a kernel or a network. A map's key has the positions
// of the axes that maps differ along. The same file serves a notebook (anywidget) and an exported page (a stand-in for the model).

const WIDTH = 640; // of a picture's canvas, in its own pixels

function make(tag, properties = {}, ...children) {
  const { attributes = {}, ...rest } = properties;
  const node = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  // JupyterLab takes the keys of what has the focus for its commands, unless that very element says otherwise
  if (["button", "input", "canvas"].includes(tag)) node.dataset.lmSuppressShortcuts = "true";
  node.append(...children);
  return node;
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
}

/** The maps of all words of a panel at one key: {h, w, words: [{low, high, q}]}, or null where none were sent. */
function mapsAt(spec, blob, key) {
  const found = spec.maps[key];
  if (!found) return null;
  const [offset, h, w] = found;
  const words = spec.words.map((_, i) => {
    const start = offset + i * (8 + h * w);
    return {
      low: blob.getFloat32(start, true), high: blob.getFloat32(start + 4, true),
      q: new Uint8Array(blob.buffer, blob.byteOffset + start + 8, h * w),
    };
  });
  return { h, w, words };
}

function shareAt(map, index) {
  return map.low + ((map.high - map.low) * map.q[index]) / 255;
}

function mean(map) {
  return map.low + ((map.high - map.low) * map.q.reduce((sum, q) => sum + q, 0)) / (255 * map.q.length);
}

/** One scale for all words of the text, so that their maps can be compared; start and padding would drown them and have their own. */
function sharedScale(spec, maps) {
  const content = maps.words.filter((_, i) => !spec.words[i].special);
  return [Math.min(...content.map((m) => m.low)), Math.max(...content.map((m) => m.high))];
}

async function decoded(spec, blob) {
  const load = async ([offset, length]) => {
    const part = new Uint8Array(blob.buffer, blob.byteOffset + offset, length);
    const colour = await createImageBitmap(new Blob([part], { type: "image/jpeg" }));
    return { colour, grey: null };
  };
  return Promise.all(spec.pictures.map(load));
}

/** The picture without its colours, so that the only colour in it is the map's. */
function greyed(picture) {
  if (picture.grey) return picture.grey;
  const { width, height } = picture.colour;
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(picture.colour, 0, 0);
  const pixels = context.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const [r, g, b] = pixels.data.subarray(i, i + 3);
    pixels.data.fill(0.299 * r + 0.587 * g + 0.114 * b, i, i + 3);
  }
  context.putImageData(pixels, 0, 0);
  return (picture.grey = canvas);
}

function coloured(map, { h, w }, [low, high], colours) {
  const canvas = make("canvas", { width: w, height: h });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(w, h);
  for (let i = 0; i < h * w; i++) {
    const level = high > low ? (shareAt(map, i) - low) / (high - low) : 0;
    const colour = colours[Math.round(255 * Math.min(Math.max(level, 0), 1))];
    pixels.data.set([...colour, 255], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** A panel's elements; `on` has what to do when a word or a place is pointed at. */
function panelOf(spec, on) {
  const panel = { spec, pictures: null, buttons: [] };
  panel.canvas = make("canvas", { className: "labkit-picture", tabIndex: 0, attributes: { role: "img", "aria-label": spec.alt } });
  panel.scale = make("div", { className: "labkit-scale" }, make("span"), make("i"), make("span"));
  const under = (event) => {
    const box = panel.canvas.getBoundingClientRect();
    const clamp = (value) => Math.min(Math.max(value, 0), 0.999999);
    return [clamp((event.clientX - box.left) / box.width), clamp((event.clientY - box.top) / box.height)];
  };
  panel.canvas.addEventListener("pointermove", (event) => on.place(under(event)));
  panel.canvas.addEventListener("pointerleave", () => on.place(null));
  panel.canvas.addEventListener("blur", () => on.place(null));
  panel.canvas.addEventListener("keydown", (event) => on.key(event, panel));
  const words = make("div", { className: "labkit-words", attributes: { role: "toolbar", "aria-label": "words of the prompt" } });
  spec.words.forEach((word, i) => {
    const share = make("span", { className: "labkit-share" });
    const button = make("button", { type: "button", className: word.special ? "labkit-word labkit-special" : "labkit-word" }, make("b", { textContent: word.text }), share);
    button.dataset.word = word.id;
    for (const name of ["pointerenter", "focus"]) button.addEventListener(name, () => on.word(word.id));
    for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => on.word(null));
    button.addEventListener("click", () => on.pin(word.id));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      panel.buttons[(i + step + panel.buttons.length) % panel.buttons.length].focus();
    });
    panel.buttons.push(button);
    words.append(button);
  });
  const caption = make("div", { className: "labkit-label", textContent: spec.label });
  panel.frame = make("div", { className: spec.words.length ? "labkit-frame" : "labkit-frame labkit-plain" }, caption, panel.canvas, panel.scale);
  panel.words = words;
  return panel;
}

function render({ model, el }) {
  const state = model.get("state"), raw = model.get("blob");
  const blob = raw instanceof DataView ? raw : new DataView(raw.buffer ?? raw, raw.byteOffset ?? 0, raw.byteLength);
  const at = state.axes.map((axis) => axis.start);
  let word = null, pinned = null, place = null, own = false, timer = null;

  const key = (positions) => state.axes.flatMap((axis, i) => (axis.maps ? [positions[i]] : [])).join(",");
  const there = (positions) => state.panels.every((spec) => spec.words.length === 0 || key(positions) in spec.maps);
  const pictureAxis = state.axes.findIndex((axis) => axis.pictures);

  const on = {
    word: (id) => { word = id; draw(); },
    pin: (id) => { pinned = pinned === id ? null : id; draw(); },
    place: (uv) => { place = uv; draw(); },
    key: (event, { spec }) => {
      const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
      if (event.key === "Escape") on.place(null);
      const maps = mapsAt(spec, blob, key(at));
      if (!step || !maps) return;
      event.preventDefault();
      const [x, y] = place ? [Math.floor(place[0] * maps.w), Math.floor(place[1] * maps.h)] : [(maps.w >> 1) - step[0], (maps.h >> 1) - step[1]];
      const inside = (cell, n) => (Math.min(Math.max(cell, 0), n - 1) + 0.5) / n;
      on.place([inside(x + step[0], maps.w), inside(y + step[1], maps.h)]);
    },
  };
  const panels = state.panels.map((spec) => panelOf(spec, on));
  const readout = make("p", { className: "labkit-readout", attributes: { "aria-live": "polite" } });

  /** Move an axis; where no map was sent for the new positions, the others go back to their first, the last axis first. */
  function move(axis, position) {
    at[axis] = position;
    for (let i = at.length - 1; i >= 0 && !there(at); i--) if (i !== axis && state.axes[i].maps) at[i] = 0;
    if (!there(at)) at[axis] = 0;
    draw();
  }

  const sliders = state.axes.map((axis, i) => {
    const input = make("input", { type: "range", min: 0, max: axis.values.length - 1, step: 1, value: at[i], attributes: { "aria-label": axis.label } });
    const value = make("output");
    input.addEventListener("input", () => { stop(); move(i, Number(input.value)); });
    const row = make("label", { className: "labkit-slider" }, make("span", { textContent: axis.label }), input, value);
    return { input, value, row, play: axis.play ? make("button", { type: "button", className: "labkit-play" }) : null };
  });
  const playing = state.axes.findIndex((axis) => axis.play);

  function stop() {
    clearInterval(timer);
    timer = null;
    if (playing >= 0) Object.assign(sliders[playing].play, { textContent: "▶ play", ariaLabel: `play over ${state.axes[playing].label}` });
  }

  function play() {
    if (timer) return stop();
    const last = state.axes[playing].values.length - 1;
    if (at[playing] === 0 || at[playing] === last) move(playing, state.axes[playing].first);
    Object.assign(sliders[playing].play, { textContent: "❚❚ stop", ariaLabel: "stop playing" });
    timer = setInterval(() => {
      if (at[playing] < last) move(playing, at[playing] + 1);
      if (at[playing] === last) stop();
    }, 400);
  }

  const scaleButton = make("button", { type: "button", className: "labkit-play labkit-stretch", attributes: { "aria-pressed": "false" } });
  scaleButton.addEventListener("click", () => { own = !own; draw(); });

  function drawPanel(panel) {
    const { spec, canvas, pictures } = panel;
    if (!pictures) return;
    const picture = pictures[pictureAxis < 0 ? 0 : Math.min(at[pictureAxis], pictures.length - 1)];
    const height = Math.round((WIDTH * picture.colour.height) / picture.colour.width);
    if (canvas.width !== WIDTH || canvas.height !== height) Object.assign(canvas, { width: WIDTH, height });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    const shown = spec.words.findIndex((w) => w.id === (word ?? pinned));
    const maps = mapsAt(spec, blob, key(at));
    const covered = maps && shown >= 0;
    context.globalAlpha = 1;
    context.drawImage(covered ? greyed(picture) : picture.colour, 0, 0, WIDTH, height);
    if (maps) {
      const [low, high] = sharedScale(spec, maps);
      const index = place && Math.floor(place[1] * maps.h) * maps.w + Math.floor(place[0] * maps.w);
      if (covered) {
        const map = maps.words[shown];
        const limits = own || spec.words[shown].special ? [map.low, map.high] : [low, high];
        context.globalAlpha = state.tint;
        context.drawImage(coloured(map, maps, limits, state.colours), 0, 0, WIDTH, height);
        context.globalAlpha = 1;
        panel.scale.firstChild.textContent = percent(limits[0]);
        panel.scale.lastChild.textContent = percent(limits[1]);
      }
      if (place) outline(context, place, maps, WIDTH, height);
      const shares = maps.words.map((map) => (place ? shareAt(map, index) : mean(map)));
      const best = Math.max(...shares.filter((_, i) => !spec.words[i].special));
      panel.buttons.forEach((button, i) => {
        button.lastChild.textContent = percent(shares[i]);
        button.style.setProperty("--share", `${Math.min(100, (100 * shares[i]) / high)}%`);
        button.classList.toggle("labkit-best", Boolean(place) && !spec.words[i].special && shares[i] === best);
        button.classList.toggle("labkit-shown", i === shown);
        button.setAttribute("aria-pressed", String(spec.words[i].id === pinned));
      });
      panel.shares = shares;
    }
    panel.scale.classList.toggle("labkit-hidden", !covered);
  }

  function say() {
    const panel = panels.find((p) => p.shares);
    if (!panel) return state.help;
    const { words } = panel.spec;
    if (place) {
      const order = words.map((_, i) => i).filter((i) => !words[i].special).sort((a, b) => panel.shares[b] - panel.shares[a]).slice(0, 3);
      return `This place listens to ${order.map((i) => `“${words[i].text}” ${percent(panel.shares[i])}`).join(", ")}.`;
    }
    const shown = words.findIndex((w) => w.id === (word ?? pinned));
    return shown < 0 ? state.help : `“${words[shown].text}” had ${percent(panel.shares[shown])} of the picture's attention; bright is where it had most.`;
  }

  function draw() {
    panels.forEach(drawPanel);
    sliders.forEach(({ input, value }, i) => {
      input.value = at[i];
      value.textContent = state.axes[i].values[at[i]];
      input.setAttribute("aria-valuetext", value.textContent);
    });
    scaleButton.textContent = own ? "each word's own scale" : "one scale for all words";
    scaleButton.setAttribute("aria-pressed", String(own));
    readout.textContent = say();
  }

  const controls = make("div", { className: "labkit-controls" });
  sliders.forEach((slider) => controls.append(slider.row, ...(slider.play ? [slider.play] : [])));
  if (playing >= 0) sliders[playing].play.addEventListener("click", play);
  const speaks = state.panels.some((spec) => spec.words.length);
  if (speaks) controls.append(scaleButton);
  const root = make("div", { className: "labkit-view", attributes: { role: "group", "aria-label": state.title } });
  const overGrey = state.colours.filter((_, i) => i % 15 === 0).map((c) => c.map((v) => 127.5 * (1 - state.tint) + state.tint * v)); // as it looks on a picture
  root.style.setProperty("--bar", `linear-gradient(to right, ${overGrey.map((c) => `rgb(${c})`).join(", ")})`);
  const below = speaks ? [controls, readout] : [controls];
  const parts = panels.map((p) => make("section", { className: "labkit-panel" }, p.frame, ...(p.spec.words.length ? [p.words] : [])));
  const single = panels.length === 1 && speaks; // beside the picture there is room for everything else
  if (single) parts.splice(0, 1, panels[0].frame, make("section", { className: "labkit-panel" }, panels[0].words, ...below));
  root.append(make("h2", { textContent: state.title }), make("div", { className: single ? "labkit-panels labkit-single" : "labkit-panels" }, ...parts));
  if (!single) root.append(...below);
  el.append(root);
  stop();
  draw();
  Promise.all(panels.map(async (panel) => { panel.pictures = await decoded(panel.spec, blob); })).then(() => {
    draw();
    root.dataset.ready = "true";
  });
  return stop;
}

/** A frame around the place of the map that is pointed at, seen on dark and on light. */
function outline(context, [u, v], { h, w }, width, height) {
  const box = [Math.floor(u * w) * (width / w), Math.floor(v * h) * (height / h), width / w, height / h];
  for (const [colour, line] of [["black", 7], ["white", 3]]) {
    Object.assign(context, { strokeStyle: colour, lineWidth: line });
    context.strokeRect(...box);
  }
}

export default { render };
