// An episode: its captions, its player, what the predictor expects.
"use strict"
const data = JSON.parse(document.getElementById("data").textContent)
const $ = id => document.getElementById(id)
const MARK = { hit: "✓", missed: "○", false: "✗", unknown: "?" }
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

function f1(hit, missed, wrong) {
  return hit + missed + wrong ? (2 * hit / (2 * hit + missed + wrong)).toFixed(2) : "–"
}

const clean = text => text.trim().replace(/\s+/g, " ")

// ------------------------------------------------------------ what was written, and what is true

function difference(written, truth) {      // their words in order, as many of both as there can be
  const [a, b] = [written.split(" "), truth.split(" ")]
  const same = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1))
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const best = Math.max(same[i + 1][j], same[i][j + 1])
      same[i][j] = a[i] === b[j] ? same[i + 1][j + 1] + 1 : best
    }
  }
  const parts = []
  for (let i = 0, j = 0; i < a.length || j < b.length;) {
    const both = i < a.length && a[i] === b[j]
    const wrong = j === b.length || (i < a.length && same[i + 1][j] >= same[i][j + 1])
    parts.push(both ? ["", a[i]] : wrong ? ["del", a[i]] : ["ins", b[j]])
    if (both || wrong) i++
    if (both || !wrong) j++
  }
  return parts
}

const isNear = row => row.kind === "false" && row.near
const inWords = row => isNear(row) ? `${row.text}, true: ${row.near}` : row.text

function partsOf(row) {                                     // [[how, words], ..], worked out once
  return row.parts ??= isNear(row) ? difference(row.text, row.near) : [["", row.text]]
}

function marked(parts) {
  const nodes = parts.flatMap(([how, words]) => [how ? make(how, {}, words) : words, " "])
  return nodes.slice(0, -1)
}

function withWords(row) {                               // and for who listens, one after the other
  if (!isNear(row)) return [row.text]
  const spoken = make("span", { className: "spoken" }, inWords(row))
  return [spoken, make("span", { ariaHidden: "true" }, ...marked(partsOf(row)))]
}

// -------------------------------------------------------------------------------- the episode

const N = data.prob ? data.prob.length : 0
const K = N ? data.ahead[0].length : 0
let step = -1
let playing = null
let images = []
const listed = []                                                              // rows of the table
let hashTimer

function drawList() {
  const cell = (x, className = "number") => make("td", { className }, x)
  const at = span => cell(span ? String(time(span[0])) : "–")
  for (const row of data.rows) {
    const start = (row.written || row.true)[0]
    const mark = make("span", { className: "mark " + row.kind }, `${MARK[row.kind]} ${row.kind}`)
    const sure = cell(row.sure === null ? "–" : row.sure.toFixed(2))
    const link = make("a", { href: "#t=" + start }, String(time(start)))
    const caption = make("td", {}, ...withWords(row))
    const cells = [cell(link), caption, cell(mark, ""), at(row.true), at(row.written)]
    listed.push(make("tr", {}, ...cells, sure))
  }
  $("list").append(...listed)
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
  const line = row => `${MARK[row.kind]} ${inWords(row)} (${row.kind}, ${moment(row[side][0])})`
  return found.map(line).join("\n") || "nothing yet"
}

function isNow(span) {
  return span && span[0] <= step && step < span[1]
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
  placeHead()
  if (scroll) $("tracks").scrollLeft = t * px - $("tracks").clientWidth / 2
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
  return clamp(Math.floor(x / px), 0, N - 1)
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
  drawTracks()
  drawList()
  drawCurve()
  if (data.features?.names.length) readFeatures()
  beginAhead()
  beginPictures()
  offerSpeeds()
  $("at").max = N - 1
  begin()
  listen()
  fromHash()
  if (step < 0) seek(0)
}
