// Prefix heat: the prefixes that recent requests share, as a tree; from the decisions that routers report.
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { call } from "./api.js";
import { Problem, show, usePoll } from "./parts.js";

export function Prefixes() {
  const [minutes, setMinutes] = useState(15);
  const { data, problem } = usePoll(() => call(`prefixes?minutes=${minutes}`), 5, [minutes]);
  const most = data && data.tree.length ? data.tree[0].asked : 1;
  return html`<h2>Shared prefixes</h2>
    <${Problem} error=${problem} />
    <div class="row"><label>Asked in the last <select value=${minutes} onChange=${(event) => setMinutes(Number(event.target.value))}>${[5, 15, 60, 360].map((n) => html`<option value=${n}>${n} minutes</option>`)}</select></label></div>
    <p class="note">${data ? `${show(data.requests)} requests with a decision; stretches that at least two of them share` : "reading …"}</p>
    ${data && data.tree.length === 0 ? html`<p class="note">No prefix is shared. Decisions come from the picker, or from routers through ReportDecision.</p>` : null}
    ${data ? html`<${Level} nodes=${data.tree} most=${most} top />` : null}`;
}

function Level({ nodes, most, top = false }) {
  return html`<ul class=${top ? "tree top" : "tree"}>${nodes.map((node) => html`<${Stretch} key=${node.key} node=${node} most=${most} />`)}</ul>`;
}

function Stretch({ node, most }) {
  const [open, setOpen] = useState(node.first === 0);
  const pods = Object.entries(node.pods);
  const text = `${show(node.blocks)} blocks from block ${node.first}, asked ${node.asked} times, on ${pods.length} pods (${pods.slice(0, 4).map(([pod, n]) => `${pod} ${n}`).join(", ")}${pods.length > 4 ? ", …" : ""}), ${show(node.saved_tokens)} tokens of prefill saved`;
  return html`<li><svg class="bar" aria-hidden="true" width=${Math.max(4, (160 * node.asked) / most)} height="11"></svg>
    ${node.children.length ? html`<button class="link" aria-expanded=${open} onClick=${() => setOpen(!open)}>${text}</button>` : text}
    ${open && node.children.length ? html`<${Level} nodes=${node.children} most=${most} />` : null}</li>`;
}
