// Fleet: pods by model and state, what they hold, how old what is known of them is; a pod's timeline.
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { call, query } from "./api.js";
import { age, Bar, clock, Figures, Opened, Problem, Reading, show, Since, Table, usePoll } from "./parts.js";

const load = (row, name) => (row.load[name] === undefined ? -1 : row.load[name]);
const TIERS = { gpu: "GPU", cpu: "CPU", disk: "disk" };
const total = (pods, tier) => pods.reduce((sum, pod) => sum + (pod.blocks[tier] || 0), 0);

export function Fleet() {
  const { data, problem, at } = usePoll(() => call("picture"), 2, []);
  const [model, setModel] = useState("");
  const [state, setState] = useState("");
  const [part, setPart] = useState("");
  const [pod, setPod] = useState("");
  const pods = data ? data.pods : [];
  const models = [...new Set(pods.map((row) => row.model))].sort();
  const shown = pods.filter((row) => (!model || row.model === model) && (!state || row.state === state) && row.pod.includes(part.trim())).map((row) => ({ ...row, key: row.pod }));
  if (pod) return html`<${Pod} name=${pod} row=${pods.find((row) => row.pod === pod)} back=${() => setPod("")} />`;
  return html`<h2>Fleet</h2>
    <${Problem} error=${problem} at=${at} />
    ${data ? html`<${Figures} figures=${[
      ["pods", show(pods.length)],
      ["live", show(pods.filter((row) => row.state === "live").length)],
      ...Object.entries(TIERS).map(([tier, title]) => [`blocks on ${title}`, show(total(pods, tier))]),
      ...Object.entries(data.stores).map(([store, blocks]) => [`blocks in the store ${store}`, show(blocks)]),
      ["messages/s", show(pods.reduce((sum, row) => sum + row.messages_per_second, 0))],
      ["messages lost", show(pods.reduce((sum, row) => sum + row.lost, 0))],
    ]} />` : html`<${Reading} />`}
    <div class="row">
      <label>Model <select value=${model} onChange=${(event) => setModel(event.target.value)}><option value="">all</option>${models.map((name) => html`<option value=${name}>${name || "(none)"}</option>`)}</select></label>
      <label>State <select value=${state} onChange=${(event) => setState(event.target.value)}><option value="">all</option>${["live", "stale", "gone"].map((name) => html`<option value=${name}>${name}</option>`)}</select></label>
      <label>Pod <input type="search" placeholder="part of its name" value=${part} onInput=${(event) => setPart(event.target.value)} /></label>
    </div>
    <h3>${show(shown.length)} ${shown.length === 1 ? "pod" : "pods"}</h3>
    <${Table} label="Pods" tall rows=${shown} empty=${!data ? "reading …" : pods.length ? "no such pod" : "the bridge has heard of no pod yet"} columns=${[
      ["Pod", (row) => html`<button class="link" onClick=${() => setPod(row.pod)}>${row.pod}</button>`, { by: (row) => row.pod }],
      ["State", (row) => html`<span class=${`state-${row.state}`}>${row.state}</span>`],
      ["Model", (row) => row.model],
      ...Object.entries(TIERS).map(([tier, title]) => [`${title[0].toUpperCase()}${title.slice(1)} blocks`, (row) => show(row.blocks[tier] || 0), { number: true, by: (row) => row.blocks[tier] || 0 }]),
      ["Running", (row) => show(load(row, "running")), { number: true, by: (row) => load(row, "running") }],
      ["Waiting", (row) => show(load(row, "waiting")), { number: true, by: (row) => load(row, "waiting") }],
      ["Cache in use", (row) => (load(row, "cache_usage") < 0 ? "–" : html`<${Bar} share=${load(row, "cache_usage")} text=${`${show(100 * load(row, "cache_usage"))} %`} />`), { number: true, by: (row) => load(row, "cache_usage") }],
      ["Messages/s", (row) => show(row.messages_per_second), { number: true, by: (row) => row.messages_per_second }],
      ["Last heard", (row) => age(row.age_ms), { number: true, by: (row) => row.age_ms }],
      ["Lost", (row) => html`<span class=${row.lost ? "warned" : ""}>${show(row.lost)}</span>`, { number: true, by: (row) => row.lost }],
    ]} />`;
}

function Pod({ name, row, back }) {
  const [since, setSince] = useState("-1h");
  const { data, problem } = usePoll(() => query("timeline", { pod: name, since }), 0, [name, since]);
  return html`<p><button class="link" onClick=${back}>← all pods</button></p>
    <${Opened} level="h2">${name}<//>
    <${Problem} error=${problem} />
    ${row
      ? html`<${Figures} figures=${[
          ["state", row.state],
          ["model", row.model || "–"],
          ["epoch", `${Math.floor(row.epoch / 2 ** 32)}.${row.epoch % 2 ** 32}`],
          ["sequence", show(row.sequence)],
          ["last heard", age(row.age_ms)],
          ["messages/s", show(row.messages_per_second)],
          ["stream known", row.coverage || "–"],
          ...["running", "waiting"].map((one) => [`requests ${one}`, show(load(row, one))]),
          ...Object.entries(row.blocks).map(([tier, blocks]) => [`blocks on ${TIERS[tier] || tier}`, show(blocks)]),
          ["messages lost", row.lost ? `${show(row.lost)} (last ${row.first_lost} to ${row.last_lost})` : "0"],
        ]} />`
      : html`<p class="note">not in the fleet any more</p>`}
    <div class="row"><${Since} label="Since" value=${since} set=${setSince} /></div>
    <h3>Timeline</h3>
    <${Table} label="Timeline" rows=${(data ? data.marks : []).map((mark, at) => ({ ...mark, key: at })).reverse()} empty=${data ? "no start, clear, gap, restart or removal in this time" : "reading the log …"} columns=${[
      ["Time", (mark) => clock(mark.at_ms)],
      ["What", (mark) => mark.type + (mark.type === "gap" ? `: ${mark.first_lost} to ${mark.last_lost < 0 ? "?" : mark.last_lost} lost` : "")],
      ["Why", (mark) => mark.reason || "–"],
      ["Sequence", (mark) => show(mark.sequence), { number: true }],
    ]} />`;
}
