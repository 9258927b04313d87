// The index of pages, and an episode: its captions, its player, what the predictor expects.
"use strict"
const data = JSON.parse(document.getElementById("data").textContent)
const $ = id => document.getElementById(id)
const MARK = { hit: "✓", missed: "○", false: "✗", unknown: "?" }
const PX = 8                                                        // pixels per step of the tracks
const ROW = 13                                                 // pixels per feature of the heat map
const WIDEST = 312                               // pixels of a text in the tracks, then it is cut
const SILENCE = 1                                   // the token that ends the answer to a step

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
}

function clamp(x, least, most) {
  return Math.min(Math.max(x, least), most)
}

const rate = data.rate                             // steps per second; times are in steps without
const decimals = Math.max(Math.ceil(Math.log10(rate)), 0)                // that tell steps apart
const time = step => rate ? (step / rate).toFixed(decimals) : step
const moment = step => rate ? `${time(step)}\u00a0s` : `step\u00a0${step}`
const duration = steps => rate ? `${time(steps)} s` : `${steps} steps`

function put(element, text) {                                  // or a screen reader repeats it
  if (element.textContent !== text) element.textContent = text
}

// ---------------------------------------------------------------------------------- the index

function f1(hit, missed, wrong) {
  return hit + missed + wrong ? (2 * hit / (2 * hit + missed + wrong)).toFixed(2) : "–"
}

function showIndex() {
  $("index").hidden = false
  $("of").textContent = data.title
  $("unit").textContent = rate ? "seconds" : "steps"
  const told = ["doubt", "surprise"].filter(k => data.pages.some(page => k in page))
  for (const part of document.querySelectorAll(".surprise")) part.hidden = !told[1]
  const total = { id: "all" }
  const counted = ["steps", "hit", "missed", "false"]
  for (const k of counted) total[k] = data.pages.reduce((sum, page) => sum + (page[k] || 0), 0)
  for (const page of [...data.pages, total]) {
    const counts = counted.map(k => page[k] || 0)
    const tells = told.map(k => page.link ? (page[k] ?? 0).toFixed(1) : "")
    const name = page.link ? make("a", { href: page.link }, page.id) : make("strong", {}, page.id)
    const cells = [time(counts[0]), ...counts.slice(1), f1(...counts.slice(1)), ...tells]
    const numbers = cells.map(x => make("td", { className: "number" }, String(x)))
    $("pages").append(make("tr", {}, make("td", {}, name), ...numbers))
  }
}

// -------------------------------------------------------------------------------- the episode

const N = data.prob ? data.prob.length : 0
const K = N ? data.ahead[0].length : 0
let step = -1
let playing = null
let images = []
let hashTimer

function drawTrack(lane, captions, look) {           // what would overlap goes into further lanes
  const free = []
  const height = lane === $("edits") ? 32 : 29
  lane.replaceChildren(...captions.map(caption => {
    const { start, end } = caption
    const { tag, label, ...properties } = look(caption)
    const wide = Math.min((label.length + 1) * 7.4 + 16, WIDEST)
    const reach = Math.max(wide, (end - start) * PX)
    let row = free.findIndex(x => x <= start * PX)
    if (row < 0) row = free.push(0) - 1
    free[row] = start * PX + reach
    const chip = make(tag, { ...properties, caption }, make("b", {}, label), make("i", {}))
    chip.firstChild.style.maxWidth = WIDEST + "px"
    chip.lastChild.style.width = (end - start) * PX + "px"
    chip.style.left = start * PX + "px"
    chip.style.top = row * height + "px"
    return chip
  }))
  const spare = lane === $("edits") ? 1 : 0               // to draw a caption where others stand
  lane.style.height = Math.max(free.length + spare, 1) * height + "px"
}

function drawSide(side) {
  const captions = data.rows.filter(row => row[side]).map(row => (
    { start: row[side][0], end: row[side][1], text: row.text, kind: row.kind }))
  drawTrack($(side), captions, ({ start, text, kind }) => (
    { tag: "a", label: `${MARK[kind]} ${text}`, className: "chip " + kind, href: "#t=" + start,
      title: text, tabIndex: -1 }))
}

function drawList() {
  const cell = (x, className = "number") => make("td", { className }, x)
  const at = span => cell(span ? String(time(span[0])) : "–")
  for (const row of data.rows) {
    const start = (row.written || row.true)[0]
    const mark = make("span", { className: "mark " + row.kind }, `${MARK[row.kind]} ${row.kind}`)
    const sure = cell(row.sure === null ? "–" : row.sure.toFixed(2))
    const link = make("a", { href: "#t=" + start }, String(time(start)))
    const cells = [cell(link), cell(row.text, ""), cell(mark, ""), at(row.true), at(row.written)]
    $("list").append(make("tr", {}, ...cells, sure))
  }
}

function drawPicture() {
  const p = data.pictures
  const image = images[Math.floor(step / p.per)]
  if (!image) return
  if (!image.complete) {
    image.onload = drawPicture
    return
  }
  const context = $("picture").getContext("2d")
  context.drawImage(image, 0, (step % p.per) * p.h, p.w, p.h, 0, 0, p.w, p.h)
}

function drawFeatures() {
  const { names, values } = data.features
  const bytes = atob(values)
  const image = new ImageData(N, names.length)
  for (let i = 0; i < bytes.length; i++) {
    const z = (bytes.charCodeAt(i) - 127) / 127
    image.data.set([...(z > 0 ? [40, 120, 230] : [225, 100, 20]), Math.abs(z) * 255], 4 * i)
  }
  Object.assign($("map"), { width: N, height: names.length })
  $("map").getContext("2d").putImageData(image, 0, 0)
  $("map").style.width = N * PX + "px"
  $("map").style.height = names.length * ROW + "px"
  $("map").setAttribute("aria-label", "heat map of " + names.join(", "))
  $("names").textContent = names.join("\n")
  $("features").hidden = false
}

function timesOf(tokens) {              // of what follows a step: each silence in it ends a step
  let ahead = 1
  return tokens.map(token => "+" + time(token === SILENCE ? ahead++ : ahead))
}

function drawAhead() {
  const expected = data.ahead[step]
  const after = data.first[step + 1]
  const then = data.tok.slice(after, after + K)
  const [expectedAt, thenAt] = [timesOf(expected), timesOf(then)]
  for (let j = 0; j < K; j++) {
    const cells = $("ahead").rows[j].cells
    const p = data.chance[step][j] / 1000
    const texts = [expectedAt[j], data.words[expected[j]], (p * 100).toFixed(0) + " %",
      thenAt[j] ?? "", data.words[then[j]] ?? "(the end)", then[j] === expected[j] ? "✓" : ""]
    texts.forEach((text, k) => cells[k].textContent = text)
    cells[2].style.backgroundSize = `calc((100% - 4.1em) * ${p}) .6em`
  }
}

function latest(side) {                                         // a line for each at the last step
  let found = []
  for (const row of data.rows) {
    if (!row[side] || row[side][0] > step) continue
    const later = found.length ? row[side][0] - found[0][side][0] : 0
    if (later > 0) found = [row]
    else if (later === 0) found.push(row)
  }
  const line = row => `${MARK[row.kind]} ${row.text} (${row.kind}, ${moment(row[side][0])})`
  return found.map(line).join("\n") || "nothing yet"
}

function isNow(span) {
  return span && span[0] <= step && step < span[1]
}

function markNow() {
  for (const chip of document.querySelectorAll(".chip")) {
    chip.classList.toggle("on", isNow([chip.caption.start, chip.caption.end]))
  }
  data.rows.forEach((row, i) => {
    const on = isNow(row.true) || isNow(row.written)
    $("list").rows[i].ariaCurrent = on ? "true" : null
  })
}

function seek(t, scroll = true) {
  t = clamp(Math.round(t), 0, N - 1)
  if (!(t >= 0) || t === step) return
  step = t
  $("at").value = t
  $("at").setAttribute("aria-valuetext", `${moment(t)} of ${time(N - 1)}`)
  $("where").textContent = `${moment(t)} / ${time(N - 1)}`
  put($("true-now"), latest("true"))
  put($("written-now"), latest("written"))
  $("said").textContent = `${data.said[t]} (≥\u00a0${(data.prob[t] / 10).toFixed(0)}\u00a0%)`
  $("now").style.minHeight = $("now").offsetHeight + "px"      // or all below jumps as it plays
  $("head").style.transform = `translateX(${(t + .5) * PX}px)`
  if (scroll) $("tracks").scrollLeft = t * PX - $("tracks").clientWidth / 2
  markNow()
  drawAhead()
  if (data.pictures) drawPicture()
  if (!chosen && !draft) showFields()
  clearTimeout(hashTimer)
  if (!playing) hashTimer = setTimeout(() => history.replaceState(null, "", "#t=" + step), 150)
}

function play(on) {
  if (on && step === N - 1) seek(0)
  playing = on ? { from: step, since: performance.now() } : null
  $("play").textContent = on ? "⏸ Pause" : "▶ Play"
  if (on) requestAnimationFrame(tick)
  else history.replaceState(null, "", "#t=" + step)
}

function tick(now) {
  if (!playing) return
  const passed = Math.max(now - playing.since, 0) / 1000
  seek(Math.floor(playing.from + passed * $("speed").value))
  if (step === N - 1) return play(false)
  requestAnimationFrame(tick)
}

function move(t, scroll) {                                  // by hand: playing goes on from there
  seek(t, scroll)
  if (playing) playing = { from: step, since: performance.now() }
}

function fromHash() {
  const found = /^#t=(\d+)/.exec(location.hash)
  if (found) move(+found[1])
}

function stepAt(event) {
  const x = event.clientX - $("inner").getBoundingClientRect().left
  return clamp(Math.floor(x / PX), 0, N - 1)
}

// ------------------------------------------------------------------------------------- start

function showTitle() {
  const { about, rows } = data
  const counts = Object.keys(MARK).map(kind => rows.filter(row => row.kind === kind).length)
  const [hit, missed, wrong, unknown] = counts
  const unsure = unknown ? `, ${unknown} written where nobody annotated` : ""
  document.title = `Captions of ${about.id}`
  $("name").textContent = `Episode ${about.id}`
  $("about").textContent = `${about.source}, ${about.split} · ${about.run} · ${duration(N)}`
  $("score").textContent = `${hit} of ${hit + missed} captions hit, ${wrong} false${unsure}`
    + ` · F1 ${f1(hit, missed, wrong)}`
  $("unknown-legend").hidden = !unknown
  $("tolerance").textContent = duration(3)
  for (const name of document.querySelectorAll(".unit")) name.append(rate ? ", s" : ", step")
}

function drawCurve() {
  $("inner").style.width = $("curve").style.width = N * PX + "px"
  $("curve").setAttribute("viewBox", `0 0 ${N * PX} 64`)
  const points = data.prob.map((p, t) => `${(t + .5) * PX},${63 - p * .062}`).join(" ")
  $("curve").querySelector("polyline").setAttribute("points", points)
}

function beginAhead() {
  $("ahead-title").parentElement.hidden = !K                           // a run without a predictor
  $("top").classList.toggle("alone", !K)
  for (let j = 0; j < K; j++) {
    const cells = Array.from({ length: 6 }, () => make("td"))
    cells[2].className = "chance"
    $("ahead").append(make("tr", {}, ...cells))
  }
}

function beginPictures() {
  const { pictures } = data
  $("picture").hidden = !pictures
  if (!pictures) return $("top").classList.add("bare")
  Object.assign($("picture"), { width: pictures.w, height: pictures.h })
  images = pictures.images.map(src => Object.assign(new Image(), { src }))
}

function offerSpeeds() {
  const speeds = rate ? [.25, .5, 1, 2, 4, 10] : [1, 2, 5, 10, 20, 60]
  for (const speed of speeds) {
    const option = { value: speed * (rate || 1), selected: speed === (rate ? 1 : 5) }
    $("speed").append(make("option", option, rate ? `${speed}×` : `${speed} steps/s`))
  }
}

function showEpisode() {
  $("episode").hidden = false
  showTitle()
  drawSide("true")
  drawSide("written")
  drawList()
  drawCurve()
  if (data.features?.names.length) drawFeatures()
  beginAhead()
  beginPictures()
  offerSpeeds()
  $("at").max = N - 1
  begin()
  listen()
  fromHash()
  if (step < 0) seek(0)
}
