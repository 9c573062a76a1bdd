// Flow: workers and their partitions, scorers, dead letters.
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { call } from "./api.js";
import { clock, Figures, Problem, ranges, show, Table, usePoll } from "./parts.js";

export function Flow() {
  const { data, problem } = usePoll(() => call("picture"), 2, []);
  const workers = data ? data.workers : [];
  const restoring = workers.reduce((sum, row) => sum + row.restoring.length, 0);
  return html`<h2>Flow</h2>
    <${Problem} error=${problem} />
    ${data && data.unserved.length ? html`<p class="problem" role="alert">no worker answers for partitions ${ranges(data.unserved)}</p>` : null}
    <${Figures} figures=${[
      ["workers", show(workers.length)],
      ["records/s applied", show(workers.reduce((sum, row) => sum + row.records_per_second, 0))],
      ["records behind", show(workers.reduce((sum, row) => sum + row.lag_records, 0))],
      ["partitions restoring", show(restoring)],
    ]} />
    <h3>Workers</h3>
    <${Table} label="Workers" rows=${workers.map((row) => ({ ...row, key: row.worker }))} columns=${[
      ["Worker", (row) => `${row.worker}${row.expired ? " (silent)" : ""}`],
      ["Endpoint", (row) => row.endpoint],
      ["Serves", (row) => ranges(row.partitions)],
      ["Standby", (row) => ranges(row.standby)],
      ["Restoring", (row) => (row.restoring.length ? html`<progress max=${row.partitions.length + row.restoring.length} value=${row.partitions.length} aria-label="restored partitions"></progress> ${ranges(row.restoring)}` : "–")],
      ["Behind", (row) => show(row.lag_records, "records"), { number: true }],
      ["Applied", (row) => show(row.records_per_second, "records/s"), { number: true }],
    ]} />
    ${data && data.scorers.length
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

function Letters() {
  const [since, setSince] = useState("");
  const { data, problem } = usePoll(async () => (since ? call(`dead-letters?since=${encodeURIComponent(since)}`) : null), 0, [since]);
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
    <div class="row"><label>Read since <select value=${since} onChange=${(event) => setSince(event.target.value)}><option value="">not read</option>${["-15m", "-1h", "-1d", "earliest"].map((text) => html`<option value=${text}>${text === "earliest" ? "the log begins" : `${text.slice(1)} ago`}</option>`)}</select></label>
    ${rows.length ? html`<button class="do" onClick=${save}>Export ${rows.length} as JSON lines</button>` : null}</div>
    ${since ? html`<${Table} label="Dead letters" tall rows=${rows} empty=${data ? "none" : "reading the log …"} columns=${[
      ["Time", (row) => clock(row.at_ms)],
      ["Pod", (row) => row.pod],
      ["Reason", (row) => row.reason],
      ["From", (row) => row.origin],
      ["Size", (row) => show(row.bytes, "bytes"), { number: true }],
    ]} />` : null}`;
}
