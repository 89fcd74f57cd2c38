"use strict";
// The page of a LoRAT server: frames go up as JPEG, boxes come back, and each frame is shown with
// the boxes that were found in it.

const COLOURS = ["#4f8cff", "#ff7a59", "#3ddc97", "#ffd166", "#c77dff", "#4dd0e1", "#ff5d8f"];
const LONGEST_SIDE = 1280; // of a frame that is sent
const AHEAD = 3; // frames on their way
const element = (id) => document.getElementById(id);
const view = element("view"), video = element("source"), brush = view.getContext("2d");

const state = {
  token: "", socket: null, open: false, live: false, running: false, paused: false, scale: 1,
  number: 0, read: 0, onTheWay: new Map(), shown: null,
  targets: new Map(), // name: {colour, box, score, first: {blob, box}, added}
  draft: null, count: 0, rows: [], times: [], retries: 0,
};

function say(text, bad = false) {
  element("state").textContent = text;
  element("state").classList.toggle("bad", bad);
}

function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("ticket");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname);
  }
  state.token = sessionStorage.getItem("token") || "";
}

// --- the connection -----------------------------------------------------------------------------

function connect() {
  const base = new URL("track", location.href);
  base.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  if (state.token) base.searchParams.set("token", state.token);
  const socket = new WebSocket(base);
  socket.binaryType = "arraybuffer";
  state.socket = socket;
  state.open = false;
  state.number = state.read = 0;
  state.onTheWay.clear();
  let hello = false, failed = false;
  return new Promise((resolve) => {
    socket.onmessage = async (event) => {
      if (socket !== state.socket) return;
      const message = JSON.parse(event.data);
      if (message.again) {
        const goesOn = state.running && !state.paused && state.targets.size;
        hangUp(); // the next frame begins again where it was
        if (goesOn) tryAgain();
      } else if (message.error) {
        failed = true;
        stop();
        say(message.error, true);
      } else if (!hello) {
        hello = true;
        state.retries = 0;
        element("model").textContent = message.model;
        socket.send(JSON.stringify({ order: "strict" }));
        await takeUp();
        state.open = true;
        resolve(true);
      } else {
        state.read += 1;
        answered(message);
      }
    };
    socket.onclose = () => {
      resolve(false); // unless it was open before
      if (socket !== state.socket) return;
      hangUp();
      if (!hello && !state.retries) {
        stop();
        say("The server asks for its token: open the address that it printed, or give it here.", true);
        element("ask").showModal();
      } else if (!failed && state.running && state.retries < 20) {
        tryAgain();
      }
    };
  });
}

function tryAgain() {
  state.retries += 1;
  say("The connection is lost; trying again …", true);
  setTimeout(async () => {
    if (!state.socket && state.running && await connect()) {
      say("Going on where it was.");
      pump();
    }
  }, Math.min(250 * state.retries, 3000));
}

// A server that is new to this session gets each target's first frame again, and its last box.
async function takeUp() {
  for (const [name, target] of state.targets) {
    if (!target.first) continue;
    command({ add: name, box: target.first.box, at: target.box });
    post(new Uint8Array(await target.first.blob.arrayBuffer()), null);
  }
}

function hangUp() {
  const socket = state.socket;
  state.socket = null;
  state.open = false;
  state.onTheWay.clear();
  if (socket) socket.close();
}

function command(message) {
  if (state.socket) state.socket.send(JSON.stringify(message));
}

function post(jpeg, frame) {
  const data = new Uint8Array(8 + jpeg.length);
  const header = new DataView(data.buffer);
  header.setUint32(0, state.number);
  header.setUint32(4, state.read);
  data.set(jpeg, 8);
  state.onTheWay.set(state.number, frame);
  state.number += 1;
  state.socket.send(data);
}

// --- frames go up -------------------------------------------------------------------------------

async function open(source) {
  stop();
  state.targets.clear();
  state.rows = [];
  state.count = state.retries = 0;
  video.srcObject = null;
  if (source instanceof MediaStream) {
    video.removeAttribute("src");
    video.srcObject = source;
  } else {
    video.src = URL.createObjectURL(source);
  }
  state.live = source instanceof MediaStream;
  try {
    await new Promise((resolve, reject) => {
      video.onloadeddata = resolve;
      video.onerror = () => reject(new Error(video.error ? video.error.message : "no video"));
    });
  } catch (error) {
    say(`This browser cannot play that video (${error.message}).`, true);
    return;
  }
  if (state.live) await video.play();
  const longest = Math.max(video.videoWidth, video.videoHeight);
  state.scale = Math.min(1, LONGEST_SIDE / longest);
  view.width = Math.round(video.videoWidth * state.scale);
  view.height = Math.round(video.videoHeight * state.scale);
  view.style.setProperty("--aspect", view.width / view.height);
  element("empty").style.display = "none";
  state.running = true;
  state.paused = false;
  state.shown = null;
  renderTargets();
  paint();
  view.focus();
  element("pause").disabled = element("csv").disabled = false;
  say("Drag a box around what to follow.");
  if (state.live) preview();
  if (await connect()) pump();
}

// A camera is seen while nothing is followed, too.
async function preview() {
  const stream = video.srcObject;
  while (state.running && video.srcObject === stream) {
    await nextFrame();
    if (state.targets.size || state.paused) continue;
    if (state.shown) state.shown.close();
    state.shown = null;
    paint();
  }
}

function stop() {
  state.running = false;
  video.pause();
  for (const track of (video.srcObject && video.srcObject.getTracks()) || []) track.stop();
  hangUp();
}

let pumping = false;
async function pump() {
  if (pumping) return;
  pumping = true;
  try {
    while (state.running && !state.paused && state.targets.size) {
      if (!state.open && (state.socket || state.retries || !(await connect()))) return;
      if (state.onTheWay.size >= AHEAD) {
        if (!state.live) video.pause(); // a file waits for its tracker, a camera cannot
        return;
      }
      if (video.ended) {
        if (!state.onTheWay.size) finished();
        return;
      }
      if (video.paused) await video.play().catch(() => {});
      await nextFrame();
      if (!state.running || !state.open || state.paused) continue;
      await sendFrame();
    }
  } finally {
    pumping = false;
  }
}

function nextFrame() {
  return new Promise((resolve) => {
    const late = setTimeout(resolve, 200); // none comes while the video stands still
    const seen = () => { clearTimeout(late); resolve(); };
    if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(seen);
    else requestAnimationFrame(seen);
  });
}

async function sendFrame() {
  const canvas = new OffscreenCanvas(view.width, view.height);
  canvas.getContext("2d").drawImage(video, 0, 0, view.width, view.height);
  const time = video.currentTime;
  const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.85 });
  if (!state.open) return;
  for (const [name, target] of state.targets) {
    if (target.first) continue;
    target.first = { blob, box: target.box };
    command({ add: name, box: target.box });
  }
  post(new Uint8Array(await blob.arrayBuffer()), { image: canvas.transferToImageBitmap(), time });
}

function finished() {
  stop();
  say("The video is over. Choose another, or take the boxes with you.");
  element("pause").disabled = true;
}

// --- boxes come back ----------------------------------------------------------------------------

function answered(answer) {
  const frame = state.onTheWay.get(answer.frame);
  state.onTheWay.delete(answer.frame);
  const before = element("model").textContent;
  if (answer.model !== before) {
    element("model").textContent = answer.model;
    say(`${answer.model} tracks now, after ${before}.`);
  }
  if (frame) {
    for (const [name, found] of Object.entries(answer.targets)) {
      const target = state.targets.get(name);
      if (!target) continue;
      target.box = found.box;
      target.score = found.score;
      const [left, top, width, height] = found.box.map((v) => (v / state.scale).toFixed(2));
      state.rows.push([answer.frame, frame.time.toFixed(3), name, left, top, width, height,
        found.score]);
    }
    if (state.shown) state.shown.close();
    state.shown = frame.image;
    const now = performance.now();
    state.times.push(now);
    while (state.times[0] < now - 1000) state.times.shift();
    element("fps").textContent = state.times.length;
    element("latency").textContent = `${answer.ms.toFixed(0)} ms`;
    paint();
    renderScores();
  }
  pump();
}

function paint() {
  brush.drawImage(state.shown || video, 0, 0, view.width, view.height);
  const thick = Math.max(2, view.width / 400);
  brush.font = `600 ${Math.max(13, view.width / 60)}px system-ui`;
  for (const [name, target] of state.targets) draw(target.box, target.colour, name, thick);
  if (state.draft) {
    brush.setLineDash([6, 4]);
    draw(state.draft, "#fff", "", thick);
    brush.setLineDash([]);
  }
}

function draw([left, top, width, height], colour, name, thick) {
  brush.lineWidth = thick;
  brush.strokeStyle = colour;
  brush.strokeRect(left, top, width, height);
  if (!name) return;
  const wide = brush.measureText(name).width + 8, high = Math.max(17, view.width / 46);
  brush.fillStyle = colour;
  brush.fillRect(left - thick / 2, Math.max(0, top - high), wide, high);
  brush.fillStyle = "#000";
  brush.fillText(name, left + 3, Math.max(0, top - high) + high * 0.75);
}

function renderTargets() {
  const list = element("targets");
  list.replaceChildren();
  for (const [name, target] of state.targets) {
    const row = document.createElement("li");
    row.style.setProperty("--own", target.colour);
    row.dataset.name = name;
    const label = document.createElement("strong"), score = document.createElement("span");
    const drop = document.createElement("button"), meter = document.createElement("meter");
    label.textContent = name;
    score.className = "score";
    drop.textContent = "Drop";
    drop.setAttribute("aria-label", `Drop ${name}`);
    drop.onclick = () => dropTarget(name);
    meter.max = 1;
    row.append(label, score, drop, meter);
    list.append(row);
  }
  renderScores();
}

function renderScores() {
  for (const row of element("targets").children) {
    const target = state.targets.get(row.dataset.name);
    row.querySelector(".score").textContent = target.score.toFixed(2);
    row.querySelector("meter").value = target.score;
  }
}

// --- targets ------------------------------------------------------------------------------------

function addTarget(box) {
  const [left, top, width, height] = box;
  if (width < 4 || height < 4) return;
  state.count += 1;
  const name = String(state.count), colour = COLOURS[(state.count - 1) % COLOURS.length];
  state.targets.set(name, { colour, box: [left, top, width, height], score: 1, first: null });
  renderTargets();
  paint();
  say(`Following ${state.targets.size === 1 ? "one target" : `${state.targets.size} targets`}.`);
  pump();
}

function dropTarget(name) {
  const target = state.targets.get(name);
  if (!target) return;
  if (target.first) command({ drop: name });
  state.targets.delete(name);
  renderTargets();
  paint();
  if (!state.targets.size) {
    if (!state.live) video.pause();
    say("Nothing is followed. Drag a box to go on.");
  }
  view.focus();
}

let corner = null;
function place(event) {
  const shape = view.getBoundingClientRect();
  const x = ((event.clientX - shape.left) * view.width) / shape.width;
  const y = ((event.clientY - shape.top) * view.height) / shape.height;
  return [Math.min(Math.max(x, 0), view.width), Math.min(Math.max(y, 0), view.height)];
}

view.addEventListener("pointerdown", (event) => {
  if (!state.running) return;
  view.setPointerCapture(event.pointerId);
  corner = place(event);
});
view.addEventListener("pointermove", (event) => {
  if (!corner) return;
  const [x, y] = place(event);
  state.draft = [Math.min(x, corner[0]), Math.min(y, corner[1]),
    Math.abs(x - corner[0]), Math.abs(y - corner[1])];
  paint();
});
function release() {
  const box = state.draft;
  corner = state.draft = null;
  if (box) addTarget(box);
  if (state.running) paint();
}
view.addEventListener("pointerup", release);
view.addEventListener("pointercancel", () => { corner = state.draft = null; });

document.addEventListener("keydown", (event) => {
  if (!state.running || ["INPUT", "BUTTON"].includes(event.target.tagName)) return;
  const step = event.altKey ? 1 : 8;
  const arrow = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step],
    ArrowDown: [0, step] }[event.key];
  if (event.key === " ") togglePause();
  else if (event.key === "b" || event.key === "B") {
    const width = view.width / 6, height = view.height / 6;
    state.draft = [(view.width - width) / 2, (view.height - height) / 2, width, height];
  } else if (event.key === "Escape") state.draft = null;
  else if (event.key === "Delete" || event.key === "Backspace") {
    dropTarget([...state.targets.keys()].at(-1));
  } else if (event.key === "Enter" && state.draft) release();
  else if (arrow && state.draft) {
    const at = event.shiftKey ? 2 : 0;
    state.draft[at] += arrow[0];
    state.draft[at + 1] += arrow[1];
    state.draft[2] = Math.max(8, state.draft[2]);
    state.draft[3] = Math.max(8, state.draft[3]);
  } else return;
  event.preventDefault();
  paint();
});

function togglePause() {
  state.paused = !state.paused;
  element("pause").innerHTML = `<kbd>Space</kbd> ${state.paused ? "Go on" : "Pause"}`;
  if (state.paused) {
    video.pause();
  } else {
    if (state.live) video.play();
    pump();
  }
}

// --- controls -----------------------------------------------------------------------------------

element("file").addEventListener("change", (event) => {
  if (event.target.files.length) open(event.target.files[0]);
  event.target.value = "";
});
element("camera").addEventListener("click", async () => {
  try {
    open(await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } }));
  } catch (error) {
    say(`The camera cannot be used (${error.message}).`, true);
  }
});
element("pause").addEventListener("click", togglePause);
element("csv").addEventListener("click", () => {
  const head = "frame,time_s,target,left,top,width,height,score";
  const link = document.createElement("a");
  const text = [head, ...state.rows.map((row) => row.join(","))].join("\n") + "\n";
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "boxes.csv";
  link.click();
  URL.revokeObjectURL(link.href);
});
const stage = element("stage");
for (const kind of ["dragover", "dragleave", "drop"]) {
  stage.addEventListener(kind, (event) => {
    event.preventDefault();
    stage.classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  });
}
element("ask").addEventListener("close", () => {
  const given = element("given").value.trim();
  if (!given) return;
  sessionStorage.setItem("token", given);
  state.token = given;
  say("Choose the video again.");
});
takeToken();
