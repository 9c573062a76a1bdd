// Decisions: where requests went, what was predicted, and what the engine said afterwards.
import { html } from "htm/preact";
import { useRef, useState } from "preact/hooks";
import { call, query } from "./api.js";
import { clock, Figures, Opened, Problem, Reading, show, Table, usePoll } from "./parts.js";

const MOST = 500;

export function Decisions() {
  const known = useRef(new Map());
  const last = useRef({ log: "", number: 0 });
  const [filter, setFilter] = useState("");
  const [one, setOne] = useState(null);
  const [live, setLive] = useState(true);
  const { data, problem, at } = usePoll(async () => {
    let answer = await call(`decisions?after=${last.current.number}`);
    if (answer.log !== last.current.log) {
      known.current.clear(); // the console was started again and counts anew
      last.current = { log: answer.log, number: 0 };
      answer = await call("decisions?after=0");
    }
    for (const row of answer.rows) {
      known.current.delete(row.request_id);
      known.current.set(row.request_id, { ...row, key: row.request_id });
      last.current.number = Math.max(last.current.number, row.number);
    }
    while (known.current.size > MOST) known.current.delete(known.current.keys().next().value);
    return { rows: [...known.current.values()].sort((a, b) => b.decided_ms - a.decided_ms || b.number - a.number), unreadable: answer.unreadable };
  }, live ? 1 : 0, [live]);
  const rows = data ? data.rows : [];
  const wanted = filter.toLowerCase();
  const shown = rows.filter((row) => !wanted || [row.request_id, row.pod, row.model, row.policy].some((text) => text.toLowerCase().includes(wanted)));
  const told = rows.filter((row) => row.served && row.served.cached_tokens >= 0);
  const exact = told.filter((row) => row.served.cached_tokens === row.predicted_tokens).length;
  const chosen = one && (rows.find((row) => row.request_id === one.request_id) || one); // it stays when newer ones push it out
  return html`<h2>Decisions</h2>
    <${Problem} error=${problem} at=${at} />
    ${data ? html`<${Figures} figures=${[
      ["newest requests", show(rows.length)],
      ["with the engine's word", show(told.length)],
      ["predicted exactly", told.length ? `${show((100 * exact) / told.length)} %` : "–"],
      ["records unreadable", show(data.unreadable)],
    ]} />` : problem ? null : html`<${Reading} />`}
    <div class="row"><label class="grow">Filter <input type="search" value=${filter} onInput=${(event) => setFilter(event.target.value)} /><small>part of a request id, pod, model or reason</small></label>
      <label class="box"><input type="checkbox" checked=${live} onChange=${(event) => setLive(event.target.checked)} /> live</label></div>
    ${chosen ? html`<${Story} key=${one.request_id} row=${chosen} close=${() => setOne(null)} />` : null}
    <h3>${show(shown.length)} requests, newest first</h3>
    <${Table} label="Decisions" tall rows=${shown} empty=${!data ? "reading …" : wanted ? "none with this" : "no decision yet: the picker writes them, and routers report them"} columns=${[
      ["Request", (row) => html`<button class="link" onClick=${() => setOne(row)}>${row.request_id}</button>`],
      ["Time", (row) => clock(row.decided_ms)],
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
    <${Opened}>${row.request_id}<//> <button class="link" onClick=${close}>close</button>
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
    <${Why} key=${row.request_id} request=${row.request_id} />
  </section>`;
}

function Why({ request }) {
  const [state, set] = useState({ busy: false, story: null, problem: null });
  async function look() {
    set({ busy: true, story: null, problem: null });
    try {
      set({ busy: false, story: await query("why", { request }), problem: null });
    } catch (problem) {
      set({ busy: false, story: null, problem });
    }
  }
  const told = state.story;
  return html`<p><button class="do" disabled=${state.busy} onClick=${look}>${state.busy ? "Reading the log …" : "The whole story, from the log"}</button></p>
    <${Problem} error=${state.problem} />
    ${told ? html`<${Figures} figures=${[
      ["blocks predicted", show(told.verdict.predicted)],
      ["held then", show(told.verdict.held)],
      ["held later", show(told.verdict.later)],
      [`most, on ${told.verdict.best_pod || "no pod"}`, show(told.verdict.best_held)],
    ]} />
      <ul class="reasons">${told.verdict.reasons.map((reason) => html`<li>${reason}</li>`)}${told.verdict.reasons.length ? null : html`<li>nothing was lost</li>`}</ul>` : null}`;
}
