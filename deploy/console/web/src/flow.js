// Flow: bridge, topics, workers and their partitions, scorers, dead letters.
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { call, query } from "./api.js";
import { age, clock, Figures, Opened, Problem, ranges, Reading, show, Since, Table, usePoll } from "./parts.js";

export function Flow() {
  const { data, problem, at } = usePoll(() => call("picture"), 2, []);
  const workers = data ? data.workers : [];
  const restoring = workers.reduce((sum, row) => sum + row.restoring.length, 0);
  if (!data) return html`<h2>Flow</h2>${problem ? html`<${Problem} error=${problem} />` : html`<${Reading} />`}`;
  return html`<h2>Flow</h2>
    <${Problem} error=${problem} at=${at} />
    ${data.unserved.length ? html`<p class="problem" role="alert">no worker answers for partitions ${ranges(data.unserved)}</p>` : null}
    <${Figures} figures=${[
      ["workers", show(workers.length)],
      ["records/s applied", show(workers.reduce((sum, row) => sum + row.records_per_second, 0))],
      ["records behind", show(workers.reduce((sum, row) => sum + row.lag_records, 0))],
      ["partitions restoring", show(restoring)],
    ]} />
    <${Bridge} pods=${data.pods} />
    <${Topics} />
    <h3>Workers</h3>
    <${Table} label="Workers" rows=${workers.map((row) => ({ ...row, key: row.worker }))} empty="no worker has been heard of" columns=${[
      ["Worker", (row) => `${row.worker}${row.expired ? " (silent)" : ""}`],
      ["Endpoint", (row) => row.endpoint],
      ["Serves", (row) => ranges(row.partitions)],
      ["Standby", (row) => ranges(row.standby)],
      ["Restoring", (row) => (row.restoring.length ? html`<progress max=${row.partitions.length + row.restoring.length} value=${row.partitions.length} aria-label="restored partitions"></progress> ${ranges(row.restoring)}` : "–")],
      ["Behind", (row) => show(row.lag_records, "records"), { number: true }],
      ["Applied", (row) => show(row.records_per_second, "records/s"), { number: true }],
    ]} />
    <${Partitions} workers=${workers} unserved=${data.unserved} />
    ${data.scorers.length
      ? html`<h3>Scorers</h3>
          <${Table} label="Scorers" rows=${data.scorers.map((row) => ({ ...row, key: row.scorer }))} columns=${[
            ["Scorer", (row) => (row.up ? row.scorer : `${row.scorer} does not answer`)],
            ["Scores/s", (row) => show(row.requests_per_second), { number: true }],
            ["p50", (row) => show(row.p50_ms, "ms"), { number: true }],
            ["p99", (row) => show(row.p99_ms, "ms"), { number: true }],
            ["Hit ratio", (row) => (row.hit_ratio === null ? "–" : `${show(100 * row.hit_ratio)} %`), { number: true }],
          ]} />`
      : null}
    <${Letters} />`;
}

function Bridge({ pods }) {
  const live = pods.filter((row) => row.state !== "gone");
  const newest = Math.min(...live.map((row) => row.age_ms).filter((ms) => ms >= 0));
  return html`<h3>Bridge</h3><${Figures} figures=${[
    ["pods heard", show(live.length)],
    ["silent", show(live.filter((row) => row.state === "stale").length)],
    ["messages/s", show(live.reduce((sum, row) => sum + row.messages_per_second, 0))],
    ["newest message", Number.isFinite(newest) ? `${age(newest)} ago` : "–"],
    ["messages lost", show(live.reduce((sum, row) => sum + row.lost, 0))],
  ]} />`;
}

function Topics() {
  const { data, problem, at } = usePoll(() => call("topics"), 2, []);
  return html`<h3>Topics</h3><${Problem} error=${problem} at=${at} />
    ${data && data.restarts ? html`<p class="note">This console was started again: ${data.restarts}</p>` : null}
    <${Table} label="Topics" rows=${(data ? data.topics : []).map((row) => ({ ...row, key: row.topic }))} empty="reading …" columns=${[
      ["Topic", (row) => row.topic],
      ["Partitions", (row) => (row.error ? row.error : show(row.partitions)), { number: true }],
      ["Kept", (row) => show(row.records, "records"), { number: true }],
      ["Written", (row) => show(row.records_per_second, "records/s"), { number: true }],
    ]} />`;
}

function Partitions({ workers, unserved }) {
  const places = new Map();
  const at = (number) => places.get(number) || places.set(number, { key: number, number, owner: "", standby: [], state: "not served" }).get(number);
  for (const row of workers.filter((one) => !one.expired)) {
    for (const number of row.partitions) Object.assign(at(number), { owner: row.worker, state: "served" });
    for (const number of row.restoring) if (!at(number).owner) Object.assign(at(number), { owner: row.worker, state: "restoring" });
    for (const number of row.standby) at(number).standby.push(row.worker);
  }
  for (const number of unserved) at(number);
  const rows = [...places.values()].sort((a, b) => a.number - b.number);
  return html`<details><summary>Partitions of kv-blocks: ${show(rows.filter((row) => row.state === "served").length)} of ${show(rows.length)} served</summary>
    <${Table} label="Partitions" tall rows=${rows} columns=${[
      ["Partition", (row) => row.number, { number: true }],
      ["Owner", (row) => row.owner || "–"],
      ["State", (row) => html`<span class=${row.state === "served" ? "good" : "warned"}>${row.state}</span>`],
      ["Standby", (row) => row.standby.join(", ") || "–"],
    ]} /></details>`;
}

function Letters() {
  const [since, setSince] = useState("");
  const [open, setOpen] = useState("");
  const { data, problem } = usePoll(async () => (since ? query("dead-letters", { since }) : null), 0, [since]);
  const rows = data ? data.letters.map((row) => ({ ...row, key: `${row.partition}/${row.offset}` })).reverse() : [];
  function save() {
    const file = new Blob(rows.map((row) => `${JSON.stringify(row)}\n`), { type: "application/x-ndjson" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(file);
    link.download = "dead-letters.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
  }
  return html`<h3>Dead letters</h3>
    <${Problem} error=${problem} />
    <div class="row"><${Since} label="Read since" value=${since} set=${setSince} none="not read" />
    ${rows.length ? html`<button class="do" onClick=${save}>Export ${show(rows.length)} as JSON lines</button>` : null}</div>
    ${since ? html`<${Table} label="Dead letters" tall rows=${rows} empty=${data ? "none" : "reading the log …"} columns=${[
      ["Time", (row) => clock(row.at_ms)],
      ["Pod", (row) => row.pod],
      ["Reason", (row) => row.reason],
      ["From", (row) => row.origin],
      ["Size", (row) => show(row.bytes, "bytes"), { number: true }],
      ["Value", (row) => html`<button class="link" aria-expanded=${open === row.key} onClick=${() => setOpen(open === row.key ? "" : row.key)}>${open === row.key ? "hide" : "show"}</button>`],
    ]} />` : null}
    ${rows.filter((row) => row.key === open).map((row) => html`<section key=${row.key} aria-label="Value"><${Opened}>Value of ${row.key}<//>
      ${row.decoded ? html`<pre class="text" tabindex="0">${row.decoded}</pre>` : null}
      <pre class="text" tabindex="0">${row.hex.replace(/(..)/g, "$1 ")}</pre>
      ${row.bytes * 2 > row.hex.length ? html`<p class="note">the first ${show(row.hex.length / 2)} of ${show(row.bytes)} bytes</p>` : null}</section>`)}`;
}
