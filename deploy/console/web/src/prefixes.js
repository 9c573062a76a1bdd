// Prefix heat: the prefixes that recent requests share, as an icicle; from the decisions that routers report.
import { html } from "htm/preact";
import { useRef, useState } from "preact/hooks";
import { call, query } from "./api.js";
import { handed } from "./ask.js";
import { Figures, Opened, Problem, Reading, show, Table, usePoll } from "./parts.js";

const HEATS = 5;
const LISTED = 50;
// What is narrower than this share of the width is left to the table, or has no room for words.
const NARROWEST = 0.002;
const WORDED = 0.08;

const flat = (nodes) => nodes.flatMap((node) => [node, ...flat(node.children)]);
const part = (node) => `blocks ${node.first}–${node.first + node.blocks - 1}`;
const said = (node) => `${part(node)}: asked ${node.asked} times, ${show(node.saved_tokens)} tokens of prefill saved`;
const pods = (count) => `${show(count)} ${count === 1 ? "pod" : "pods"}`;

export function Prefixes() {
  const [minutes, setMinutes] = useState(15);
  const [chosen, choose] = useState("");
  const { data, problem, at } = usePoll(() => call(`prefixes?minutes=${minutes}`), 5, [minutes]);
  const tree = data ? data.tree : [];
  const all = flat(tree).sort((a, b) => b.saved_tokens - a.saved_tokens || b.asked - a.asked);
  const most = all.length ? all[0].saved_tokens : 0;
  const opened = useRef(null); // stays open as it was when newer requests part it
  opened.current = all.find((node) => node.key === chosen) || opened.current;
  const one = chosen && opened.current;
  return html`<h2>Shared prefixes</h2>
    <${Problem} error=${problem} at=${at} />
    <div class="row"><label>Asked in the last <select value=${minutes} onChange=${(event) => setMinutes(Number(event.target.value))}>${[5, 15, 60, 360].map((n) => html`<option value=${n}>${n} minutes</option>`)}</select></label></div>
    ${data ? html`<${Figures} figures=${[
      ["requests with a decision", show(data.requests)],
      ["of them with a shared prefix", show(tree.reduce((sum, node) => sum + node.asked, 0))],
      ["prefill saved", show(all.reduce((sum, node) => sum + node.saved_tokens, 0), "tokens")],
    ]} />` : problem ? null : html`<${Reading} />`}
    ${data && tree.length === 0 ? html`<p class="note">No prefix is shared. Decisions come from the picker, or from routers through ReportDecision.</p>` : null}
    ${tree.length ? html`<p class="note">From the prompts' beginning downwards: as wide as requests ask for it, as dark as prefill it saved.</p>
      <div class="scroll" role="group" aria-label="Icicle"><${Level} nodes=${tree} asked=${data.requests} all=${data.requests} most=${most} chosen=${chosen} choose=${choose} /></div>` : null}
    ${one ? html`<${Stretch} key=${one.key} node=${one} minutes=${minutes} close=${() => choose("")} />` : null}
    ${all.length ? html`<h3>${all.length > LISTED ? `${LISTED} of ${show(all.length)}` : show(all.length)} stretches, most prefill saved first</h3>
      <${Table} label="Stretches" rows=${all.slice(0, LISTED)} columns=${[
        ["Stretch", (node) => html`<button class="link" onClick=${() => choose(node.key)}>${part(node)}</button>`],
        ["Blocks", (node) => show(node.blocks), { number: true }],
        ["Asked", (node) => `${show(node.asked)} times`, { number: true }],
        ["Went to", (node) => pods(Object.keys(node.pods).length), { number: true }],
        ["Prefill saved", (node) => show(node.saved_tokens, "tokens"), { number: true }],
      ]} />` : null}`;
}

function Level({ nodes, asked, all, most, chosen, choose }) {
  const wide = nodes.filter((node) => node.asked >= NARROWEST * all);
  const rest = asked - wide.reduce((sum, node) => sum + node.asked, 0);
  if (wide.length === 0) return null;
  return html`<ul class="icicle">${wide.map((node) => html`<li key=${node.key} style=${{ flexGrow: node.asked }}>
      <button class=${`heat-${most ? Math.ceil(HEATS * Math.sqrt(node.saved_tokens / most)) : 0}`} aria-pressed=${node.key === chosen} onClick=${() => choose(node.key)} title=${said(node)} aria-label=${said(node)}>${node.asked >= WORDED * all ? part(node) : ""}</button>
      <${Level} nodes=${node.children} asked=${node.asked} all=${all} most=${most} chosen=${chosen} choose=${choose} />
    </li>`)}${rest > 0 ? html`<li key="rest" aria-hidden="true" style=${{ flexGrow: rest }}></li>` : null}</ul>`;
}

function Stretch({ node, minutes, close }) {
  const [read, set] = useState(null);
  async function look() {
    set({ text: "reading the log …", holders: null });
    try {
      const found = await query("stretch", { key: node.key, first: node.first, since: `-${2 * minutes}m` });
      set({ text: found.text || `not shown: ${found.why}`, holders: found.holders, question: found.question });
    } catch (error) {
      set({ text: `not shown: ${error.message}`, holders: null });
    }
  }
  function ask() {
    handed.text = JSON.stringify(read.question);
    window.location.hash = "ask";
  }
  const went = Object.entries(node.pods);
  const tiers = read && read.holders ? Object.entries(read.holders) : [];
  return html`<section aria-label="Stretch"><${Opened}>${part(node)}<//> <button class="link" onClick=${close}>close</button>
    <${Figures} figures=${[
      ["blocks", show(node.blocks)],
      ["asked", `${show(node.asked)} times`],
      ["prefill saved", show(node.saved_tokens, "tokens")],
      ...tiers.map(([tier, count]) => [`hold all of it on ${tier} now`, pods(count)]),
    ]} />
    <p class="note">Requests went to ${went.slice(0, 12).map(([pod, n]) => `${pod} (${show(n)})`).join(", ")}${went.length > 12 ? ` and ${went.length - 12} more` : ""}.</p>
    ${read && read.question ? html`<p><button class="do" onClick=${ask}>Ask about it</button></p>` : null}
    ${read ? html`<pre class="text" tabindex="0">${read.text}</pre>` : html`<p><button class="do" onClick=${look}>Its text, and who holds it now</button></p>`}
  </section>`;
}
