// The tracks of an episode: captions in lanes, confidence, features; how they are zoomed.

const PX = 8                                                    // pixels per step, to begin with
const ROW = 13                                                 // pixels per feature of the heat map
const ROWS = 24                                                      // features in it, at most
const WIDEST = 312                               // pixels of a text in the tracks, then it is cut
const GAP = 4                                                   // pixels between two in a lane
const FEW = 6                                // lanes, before texts are cut to make room for others
const CUT = 88                                                    // pixels that are left of them
const MANY = 12                                      // lanes, before nothing but a mark is left
const SMALL = 20                              // its pixels; fewer from afar, with nothing in them
let px = PX                                                                     // as it is zoomed
let moves                                                        // bytes of each feature and step
let drawn = [1, 0]                                   // pixels of the tracks that have their chips
const places = { true: [], written: [] }              // of all chips: where, and what they are
const chips = {}                                               // the elements of each lane

function freeLane(lanes, left) {                    // of the last place in each; or it cuts a text
  const free = lanes.findIndex(last => Math.max(last.left + last.wide, last.end) + GAP <= left)
  if (free >= 0) return free
  const room = lanes.map(last => last.end + GAP <= left ? left - last.left - GAP : 0)
  const most = Math.max(0, ...room)
  const least = lanes.length < FEW ? Infinity : lanes.length < MANY ? CUT : Math.min(3 * px, SMALL)
  if (most < least) return lanes.length
  const row = room.indexOf(most)
  lanes[row].wide = most
  return row
}

function widthOf(text) {                                     // about; ideographs are twice as wide
  return [...text].reduce((sum, letter) => sum + (letter > "\u2e80" ? 14 : 7.4), 24)
}

function place(lane, captions, look) {              // what would overlap is cut, or another lane's
  const lanes = []
  const height = lane === $("edits") ? 32 : 29
  const found = captions.map(caption => {
    const { parts, ...about } = look(caption)
    const left = caption.start * px
    const long = Math.max((caption.end - caption.start) * px - 2, 2)
    const wide = Math.min(widthOf(parts.map(part => part[1]).join(" ")), WIDEST)
    const row = freeLane(lanes, left)
    const top = row * height
    return lanes[row] = { caption, parts, about, left, top, long, wide, end: left + long }
  })
  const spare = lane === $("edits")                       // to draw a caption where others stand
  lane.style.height = Math.max(lanes.length + spare, 1) * height + "px"
  return found
}

function chipOf({ caption, parts, about, left, top, long, wide }) {
  const { tag, ...properties } = about
  const chip = make(tag, { ...properties, caption }, make("b", {}, ...marked(parts)), make("i"))
  chip.classList.toggle("small", wide < SMALL)
  chip.firstChild.style.maxWidth = wide + "px"
  chip.lastChild.style.width = long + "px"
  chip.style.left = left + "px"
  chip.style.top = top + "px"
  return chip
}

function layOut(side) {
  const captions = data.rows.filter(row => row[side]).map(row => (
    { start: row[side][0], end: row[side][1], row }))
  places[side] = place($(side), captions, ({ start, row }) => (
    { tag: "a", parts: [["", MARK[row.kind]], ...partsOf(row)], className: "chip " + row.kind,
      href: "#t=" + start, title: inWords(row), tabIndex: -1 }))
}

function drawSeen() {                   // what is seen, and a width beside it: thousands are slow
  const { scrollLeft, clientWidth } = $("tracks")
  if (drawn[0] <= scrollLeft && scrollLeft + clientWidth <= drawn[1]) return
  drawn = [scrollLeft - clientWidth, scrollLeft + 2 * clientWidth]
  for (const side in places) {
    const isSeen = x => Math.max(x.left + x.wide, x.end) >= drawn[0] && x.left <= drawn[1]
    chips[side] = places[side].filter(isSeen).map(x => x.chip ??= chipOf(x))
    $(side).replaceChildren(...chips[side])
  }
  markNow()
}

function markNow() {                                          // the DOM is slow: changes alone
  for (const chip of Object.values(chips).flat()) {
    const on = isNow([chip.caption.start, chip.caption.end])
    if (chip.isOn !== on) chip.classList.toggle("on", chip.isOn = on)
  }
  data.rows.forEach((row, i) => {
    const on = isNow(row.true) || isNow(row.written) ? "true" : null
    if (listed[i] && listed[i].isOn !== on) listed[i].ariaCurrent = listed[i].isOn = on
  })
}

async function readFeatures() {
  const packed = Uint8Array.from(atob(data.features.values), letter => letter.charCodeAt(0))
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))
  moves = new Uint8Array(await new Response(stream).arrayBuffer())             // a row a feature
  $("find").parentElement.hidden = $("features").hidden = false
  drawFeatures()
}

function drawFeatures() {                     // of those asked for, the ones that move most
  const { names } = data.features
  const asked = $("find").value.toLowerCase().split(",").map(clean).filter(Boolean)
  const fits = name => !asked.length || asked.some(part => name.toLowerCase().includes(part))
  const found = [...names.keys()].filter(k => fits(names[k]))
  const shown = found.slice(0, ROWS)
  const image = new ImageData(N, Math.max(shown.length, 1))
  const pixels = new Uint32Array(image.data.buffer)                       // alpha, blue, green, red
  const colours = Uint32Array.from({ length: 256 }, (_, byte) => (
    Math.min(Math.abs(byte - 127) * 2, 255) * 2 ** 24 + (byte > 127 ? 0xe67828 : 0x1464e1)))
  shown.forEach((k, row) => {
    for (let t = 0; t < N; t++) pixels[row * N + t] = colours[moves[k * N + t]]
  })
  Object.assign($("map"), { width: N, height: image.height })
  $("map").getContext("2d").putImageData(image, 0, 0)
  $("map").style.height = image.height * ROW + "px"
  const named = shown.map(k => names[k])
  $("map").setAttribute("aria-label", "heat map of " + (named.join(", ") || "nothing"))
  $("names").textContent = named.join("\n")
  put($("found"), `${shown.length} shown, ${found.length} of ${names.length} fit`)
}

function drawCurve() {
  $("curve").setAttribute("viewBox", `0 0 ${N} 64`)
  const points = data.prob.map((p, t) => `${t + .5},${63 - p * .062}`).join(" ")
  $("curve").querySelector("polyline").setAttribute("points", points)
}

function placeHead() {
  $("head").style.transform = `translateX(${(step + .5) * px}px)`
}

function drawTracks(scrolled = 0) {
  for (const id of ["inner", "curve", "map"]) $(id).style.width = N * px + "px"
  for (const side in places) layOut(side)
  if ($("edit").open) drawEdits()
  $("tracks").scrollLeft = scrolled
  drawn = [1, 0]
  drawSeen()
}

function zoom(factor, x) {                    // about x pixels from the left, or the step, if seen
  const tracks = $("tracks")
  const wide = tracks.clientWidth
  const head = (step + .5) * px - tracks.scrollLeft
  x ??= clamp(head, 0, wide) === head ? head : wide / 2
  const middle = (tracks.scrollLeft + x) / px
  px = clamp(px * factor, Math.min(wide / N, PX), 64)
  drawTracks(middle * px - x)
  placeHead()
}

function wheel(event) {
  if (!event.ctrlKey && !event.metaKey) return                     // or the page cannot be scrolled
  event.preventDefault()
  const x = event.clientX - $("tracks").getBoundingClientRect().left
  zoom(Math.exp(-event.deltaY / 300), x)
}
