// Decisions: where requests went, what was predicted, and what the engine said afterwards.
import { html } from "htm/preact";
import { useRef, useState } from "preact/hooks";
import { call } from "./api.js";
import { clock, Figures, Problem, show, Table, usePoll } from "./parts.js";

const MOST = 500;

export function Decisions() {
  const known = useRef(new Map());
  const last = useRef(0);
  const [filter, setFilter] = useState("");
  const [one, setOne] = useState("");
  const { data, problem } = usePoll(async () => {
    const answer = await call(`decisions?after=${last.current}`);
    for (const row of answer.rows) {
      known.current.delete(row.request_id);
      known.current.set(row.request_id, { ...row, key: row.request_id });
      last.current = Math.max(last.current, row.number);
    }
    while (known.current.size > MOST) known.current.delete(known.current.keys().next().value);
    return { rows: [...known.current.values()].reverse(), unreadable: answer.unreadable };
  }, 1, []);
  const rows = data ? data.rows : [];
  const wanted = filter.toLowerCase();
  const shown = rows.filter((row) => !wanted || [row.request_id, row.pod, row.model, row.policy].some((text) => text.toLowerCase().includes(wanted)));
  const told = rows.filter((row) => row.served && row.served.cached_tokens >= 0);
  const exact = told.filter((row) => row.served.cached_tokens === row.predicted_tokens).length;
  const chosen = rows.find((row) => row.request_id === one);
  return html`<h2>Decisions</h2>
    <${Problem} error=${problem} />
    <${Figures} figures=${[
      ["newest requests", show(rows.length)],
      ["with the engine's word", show(told.length)],
      ["predicted exactly", told.length ? `${show((100 * exact) / told.length)} %` : "–"],
      ["records unreadable", show(data ? data.unreadable : 0)],
    ]} />
    <label>Filter <input type="search" value=${filter} onInput=${(event) => setFilter(event.target.value)} /><small>part of a request id, pod, model or reason</small></label>
    ${chosen ? html`<${Story} row=${chosen} close=${() => setOne("")} />` : null}
    <h3>${shown.length} requests, newest first</h3>
    <${Table} label="Decisions" tall rows=${shown} empty="no decision yet: the picker writes them, and routers report them" columns=${[
      ["Time", (row) => clock(row.decided_ms)],
      ["Request", (row) => html`<button class="link" onClick=${() => setOne(row.request_id)}>${row.request_id}</button>`],
      ["Pod", (row) => row.pod],
      ["Predicted tokens", (row) => show(row.predicted_tokens), { number: true }],
      ["Cached tokens", (row) => (row.served ? show(row.served.cached_tokens) : "–"), { number: true }],
      ["First token", (row) => (row.served ? show(row.served.first_token_ms, "ms") : "–"), { number: true }],
      ["Outcome", (row) => (row.served && row.served.outcome) || row.outcome || "open"],
      ["Why", (row) => row.degraded || (row.served && row.served.cause) || row.policy || "–"],
    ]} />`;
}

function Story({ row, close }) {
  const scores = Object.entries(row.scores).map(([pod, [score, blocks]]) => ({ key: pod, pod, score, blocks }));
  return html`<section aria-label=${`Request ${row.request_id}`}>
    <h3>${row.request_id} <button class="link" onClick=${close}>close</button></h3>
    <${Figures} figures=${[
      ["went to", row.pod],
      ["model", row.model || "–"],
      ["blocks", show(row.blocks)],
      ["predicted", show(row.predicted_tokens, "tokens")],
      ["cached", row.served ? show(row.served.cached_tokens, "tokens") : "–"],
      ["first token", row.served ? show(row.served.first_token_ms, "ms") : "–"],
      ["regret", row.served ? show(row.served.regret_tokens, "tokens") : "–"],
    ]} />
    <${Table} label="Scores at the decision" rows=${scores} empty="no pod held a block" columns=${[
      ["Pod", (entry) => entry.pod],
      ["Score", (entry) => show(entry.score), { number: true }],
      ["Blocks", (entry) => show(entry.blocks), { number: true }],
    ]} />
    <p class="note">The log as of then and later: <code>kvatlas why ${row.request_id}</code></p>
  </section>`;
}
