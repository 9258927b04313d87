// Corrections of an episode's captions, by mouse and keyboard, undone, kept and saved.

let items = []        // {start, end, text, by, sure}, never changed; without text nothing happens
let before = []                                                    // what undo returns to, in turn
let chosen = null                                                         // the one that is edited
let draft = null                                          // the span of a new one, else this step's
let saved = true
let fate = ""                                                   // of what is corrected, in words
let store                                                          // names this work in the browser

const KEPT = "not saved yet, kept in this browser"
const inTime = (a, b) => a.start - b.start || a.end - b.end
const here = () => ({ start: step, end: step + 1, text: "" })

function begin() {
  const { about, rows } = data
  const person = ([start, end], text) => ({ start, end, text, by: "person" })
  for (const { kind, text, true: span, written, sure } of rows) {
    if (span) items.push(person(span, text))
    else if (kind === "unknown" && clean(text)) {
      items.push({ start: written[0], end: written[1], text: clean(text), by: "encoder", sure })
    }
  }
  items.push(...data.silences.map(span => person(span, "")))
  items.sort(inTime)
  store = "captions " + JSON.stringify([about.source, about.split, about.id, items])
  try {
    const kept = JSON.parse(localStorage.getItem(store))
    if (kept) ({ items, saved } = kept)
  } catch {}                                                         // a browser that keeps nothing
  if (!saved) fate = KEPT
  $("edit").open = !saved
  $("texts").append(...data.texts.map(value => make("option", { value })))
  showWork()
}

function told({ start, end, text, by }) {
  return `${text || "nothing"} from ${moment(start)} to ${moment(end)}, by ${by}`
}

function showWork() {
  const count = `${items.filter(item => item.text).length} captions`
  put($("work"), [chosen && told(chosen), count, fate].filter(Boolean).join("; "))
  $("undo").disabled = !before.length
}

function keep() {
  fate = saved ? "saved" : KEPT
  try {
    localStorage.setItem(store, JSON.stringify({ items, saved }))
  } catch {
    if (!saved) fate = "not saved yet, lost when the page is closed"
  }
}

function drawEdits() {
  const found = place($("edits"), items, item => {
    const className = `chip ${item.by} ${item.text ? "" : "silent"}`
    const [parts, title] = [[["", item.text || "nothing"]], told(item)]
    const pressed = { ariaPressed: String(chosen === item), onclick: () => choose(item) }
    return { tag: "button", parts, title, className, ...pressed }
  })
  chips.edits = found.map(chipOf)
  $("edits").replaceChildren(...chips.edits, make("div", { id: "draft" }))
  outline(draft)
  markNow()
}

function outline(span) {
  if (!$("draft")) return                                                   // nothing is drawn yet
  $("draft").hidden = !span
  if (!span) return
  $("draft").style.left = span.start * px + "px"
  $("draft").style.width = (span.end - span.start) * px + "px"
}

function showFields() {
  const { start, end, text } = chosen || draft || here()
  $("text").value = text
  $("start").value = time(start)
  $("end").value = time(end)
  $("add").textContent = chosen ? "Change" : "Add"
  $("remove").disabled = !chosen
  outline(draft)
}

function choose(item, span = null) {
  chosen = item
  draft = span
  for (const chip of $("edits").querySelectorAll(".chip")) {
    chip.setAttribute("aria-pressed", chip.caption === item)
  }
  showFields()
  showWork()
}

function become(next, item = null) {
  const focused = $("edits").contains(document.activeElement)
  items = next.sort(inTime)
  saved = false
  keep()
  drawEdits()
  choose(item)
  if (focused && item) $("edits").children[items.indexOf(item)].focus()
}

function replace(old, changed) {
  const item = { ...changed, by: "person" }
  const inside = other => item.start <= other.start && other.start < item.end
  const rest = items.filter(other => other !== old && (item.text || !inside(other)))
  before.push(items)
  become([...rest, item], item)
}

function change(edit) {
  if (chosen) replace(chosen, { ...chosen, ...edit(chosen) })
}

function undo() {
  if (before.length) become(before.pop())
}

function remove() {
  if (!chosen) return
  before.push(items)
  become(items.filter(item => item !== chosen))
}

function fromFields(text) {
  const stepIn = id => Math.round($(id).valueAsNumber * (rate || 1)) || 0
  const start = clamp(stepIn("start"), 0, N - 1)
  const end = clamp(stepIn("end"), start + 1, N)
  replace(chosen, { ...chosen, start, end, text })
}

function submit(event) {
  event.preventDefault()
  const text = clean($("text").value)
  if (!text && (!chosen || chosen.text)) return $("text").focus()
  fromFields(text)
  document.activeElement.blur()                                  // so that keys are commands again
}

function goTo(item) {
  if (!item) return
  choose(item)
  move(item.start)
}

function save() {
  const typed = clean($("text").value)
  if (typed && typed !== chosen?.text) fromFields(typed)
  const episode = data.about.id
  const unit = rate ? "seconds" : "steps"
  const exact = step => step / (rate || 1)                      // unrounded, it is the step again
  const lines = items.map(({ start, end, text, by, sure }) => (
    { episode, start: exact(start), end: exact(end), text, unit, by, sure }))
  const file = (lines.length ? lines : [{ episode }]).map(line => JSON.stringify(line) + "\n")
  const href = URL.createObjectURL(new Blob(file, { type: "application/jsonl" }))
  make("a", { href, download: `captions-${episode.replace(/[^\w.-]+/g, "_")}.jsonl` }).click()
  saved = true
  keep()
  showWork()
}

function drag(event) {                                     // a new span, a caption, or its end
  if (event.button) return
  const lane = $("edits")
  const from = stepAt(event)
  const item = event.target.closest(".chip")?.caption
  const isEnd = event.target.tagName === "I"
  const spanAt = to => {
    if (!item) return { ...here(), start: Math.min(from, to), end: Math.max(from, to) + 1 }
    if (isEnd) return { ...item, end: clamp(item.end + to - from, item.start + 1, N) }
    const by = clamp(to - from, -item.start, N - item.end)
    return { ...item, start: item.start + by, end: item.end + by }
  }
  const stop = () => lane.onpointermove = lane.onpointerup = lane.onpointercancel = null
  lane.setPointerCapture(event.pointerId)
  lane.onpointermove = event => outline(spanAt(stepAt(event)))
  lane.onpointercancel = () => {
    stop()
    outline(draft)
  }
  lane.onpointerup = event => {
    stop()
    const span = spanAt(stepAt(event))
    if (item && span.start === item.start && span.end === item.end) choose(item)
    else if (item) replace(item, span)
    else choose(null, span)
    move(span.start, false)
    if (!item) $("text").focus()
  }
}

// -------------------------------------------------------------------------------------- keys

const COMMANDS = {
  a: () => {
    choose(null, here())
    $("text").focus()
  },
  x: () => {
    choose(null, draft || here())
    fromFields("")
  },
  p: () => goTo(items[items.indexOf(chosen) - 1] || items.findLast(item => item.start < step)),
  n: () => goTo(chosen ? items[items.indexOf(chosen) + 1] : items.find(item => item.start >= step)),
  t: () => $("text").focus(),
  s: () => change(({ start, end }) => ({ start: step, end: Math.min(step + end - start, N) })),
  e: () => change(({ start }) => ({ start: Math.min(start, step), end: step + 1 })),
  Delete: remove,
  Backspace: remove,
  Escape: () => {
    choose(null)
    document.activeElement.blur()
  },
}

function command(event) {                                    // true where the key is an edit's
  if (!$("edit").open || event.altKey) return false
  const typing = event.target.matches("input:not([type=range]), select")
  const withControl = { s: save, z: typing ? null : undo }
  const plain = typing && event.key !== "Escape" ? {} : COMMANDS
  const does = (event.ctrlKey || event.metaKey ? withControl : plain)[event.key]
  if (!does) return false
  does()
  return true
}

function keys(event) {
  if (command(event)) return event.preventDefault()
  const { target, key } = event
  if (event.altKey || event.ctrlKey || event.metaKey) return
  if (target.matches("input:not([type=range]), select")) return
  const by = event.shiftKey ? 10 : 1
  const to = { ArrowLeft: step - by, ArrowRight: step + by, Home: 0, End: N - 1 }[key]
  if (to !== undefined) move(to)
  else if ("+=-".includes(key)) zoom(key === "-" ? .8 : 1.25)
  else if (key === " " && !target.matches("button, summary")) play(!playing)
  else return
  event.preventDefault()
}

function listen() {
  $("at").oninput = () => move(+$("at").value)
  $("play").onclick = () => play(!playing)
  $("speed").onchange = () => move(step)
  $("tracks").onscroll = drawSeen
  $("tracks").addEventListener("wheel", wheel, { passive: false })
  $("nearer").onclick = () => zoom(1.25)
  $("farther").onclick = () => zoom(.8)
  $("find").oninput = drawFeatures
  $("inner").onclick = event => {
    if (!event.target.closest(".chip, #edits")) move(stepAt(event), false)
  }
  $("edit").ontoggle = () => {
    $("yours").hidden = !$("edit").open
    if ($("edit").open) drawEdits()
  }
  $("edits").onpointerdown = drag
  $("text").onfocus = () => chosen || draft || choose(null, here())
  $("form").onsubmit = submit
  $("nothing").onclick = () => fromFields("")
  $("remove").onclick = remove
  $("undo").onclick = undo
  $("save").onclick = save
  addEventListener("hashchange", fromHash)
  addEventListener("keydown", keys)
}
