// The index of pages: episodes, captions of all of them, what is confused, F1 by text, learning.

const SHOWN = 200                                              // captions listed at once, at most

function row(...cells) {                                        // numbers stand to the right
  const isNumber = x => /^[-–\d.]*$/.test(x)
  return make("tr", {}, ...cells.map(cell => cell instanceof Node ? make("td", {}, cell)
    : make("td", { className: isNumber(cell) ? "number" : "" }, String(cell))))
}

function listPages() {
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
    $("pages").append(row(name, ...cells))
  }
}

function listCaptions(all) {
  const text = $("containing").value.toLowerCase()
  const kind = $("kind").value
  const fits = { "": () => true, unsure: caption => caption.sure !== null }[kind]
    || (caption => caption.kind === kind)
  const has = caption => inWords(caption).toLowerCase().includes(text)
  const found = all.filter(caption => fits(caption) && has(caption))
  if (kind === "unsure") found.sort((a, b) => a.sure - b.sure)
  $("captions").replaceChildren(...found.slice(0, SHOWN).map(caption => {
    const { page, step, kind, sure } = caption
    const link = make("a", { href: `${page.link}#t=${step}` }, page.id)
    const how = make("span", { className: "mark " + kind }, `${MARK[kind]} ${kind}`)
    const words = make("span", {}, ...withWords(caption))
    return row(link, time(step), words, how, sure === null ? "–" : sure.toFixed(2))
  }))
  const shown = found.length > SHOWN ? `, the first ${SHOWN} are shown` : ""
  put($("matching"), `${found.length} of ${all.length}${shown}`)
}

function tally(all, keyOf) {                           // [key, {kind: how often, ..}] of each key
  const groups = {}
  for (const caption of all) {
    const counts = groups["=" + keyOf(caption)] ??= { hit: 0, missed: 0, false: 0 }
    counts[caption.kind]++
  }
  return Object.entries(groups).map(([key, counts]) => [key.slice(1), counts])
}

function listConfusions(all) {
  const pairs = tally(all.filter(isNear), ({ text, near }) => JSON.stringify([text, near]))
  $("confusions").hidden = !pairs.length
  for (const [pair, counts] of pairs.sort((a, b) => b[1].false - a[1].false).slice(0, 10)) {
    const [text, near] = JSON.parse(pair)
    const words = make("span", { ariaHidden: "true" }, ...marked(difference(text, near)))
    $("confused").append(row(counts.false, make("span", {}, text), make("span", {}, near), words))
  }
}

function drawScores(title, all, keyOf) {
  const body = make("tbody")
  const counted = tally(all, keyOf).map(([key, { hit, missed, false: wrong }]) => (
    [key, hit + missed, f1(hit, missed, wrong)]))
  for (const [key, count, score] of counted.sort((a, b) => b[1] - a[1])) {
    const line = row(make("span", {}, key), count, score)
    line.cells[2].className = "bar"
    line.cells[2].style.backgroundSize = `calc((100% - 3.4em) * ${score}) .6em`
    body.append(line)
  }
  const head = make("thead")
  head.innerHTML = "<tr><th scope=col>caption<th scope=col class=number>true<th scope=col>F1"
  const table = make("div", { className: "scroll tall", tabIndex: 0, role: "region",
    ariaLabel: title }, make("table", {}, head, body))
  $("scores").append(make("section", { className: "card" }, make("h2", {}, title), table))
}

function drawLearning() {
  const curves = Object.entries(data.curves || {})
  $("learning").hidden = !curves.length
  for (const [name, points] of curves) {
    const [xs, ys] = [points.map(point => point[0]), points.map(point => point[1])]
    const [low, high] = [ys.reduce((a, b) => Math.min(a, b)), ys.reduce((a, b) => Math.max(a, b))]
    const x = at => 100 * (at - xs[0]) / (xs.at(-1) - xs[0] || 1)
    const y = value => 56 - 52 * (value - low) / (high - low || 1)
    const line = points.map(([at, value]) => `${x(at)},${y(value)}`).join(" ")
    const told = value => +value.toPrecision(3)
    const figure = make("figure")
    figure.innerHTML = `<svg viewBox="0 0 100 60" preserveAspectRatio="none" aria-hidden="true">
      <polyline points="${line} ${x(xs.at(-1))},${y(ys.at(-1))}" /></svg>`
    figure.prepend(make("figcaption", {}, `${name} `, make("strong", {}, String(told(ys.at(-1))))))
    figure.append(`${told(low)} .. ${told(high)}, updates ${xs[0]} .. ${xs.at(-1)}`)
    $("curves").append(figure)
  }
}

function showIndex() {
  $("index").hidden = false
  $("of").textContent = data.title
  $("unit").textContent = rate ? "seconds" : "steps"
  $("unit-all").textContent = rate ? "at, s" : "at, step"
  listPages()
  const all = data.pages.flatMap(page => (page.rows || []).map(
    ([step, kind, text, near, sure]) => ({ page, step, kind, text, near, sure })))
  const judged = all.filter(caption => caption.kind !== "unknown")
  if (judged.length) {
    drawScores("F1 by caption", judged, caption => caption.text)
    drawScores("F1 by first word", judged, caption => caption.text.split(" ", 1)[0])
  }
  listConfusions(all)
  drawLearning()
  listCaptions(all)
  $("containing").oninput = $("kind").oninput = () => listCaptions(all)
  $("filter").onsubmit = event => event.preventDefault()
}
