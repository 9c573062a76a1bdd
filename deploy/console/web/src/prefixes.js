// Prefix heat: the prefixes that recent requests share, as a tree; from the decisions that routers report.
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { call, query } from "./api.js";
import { Figures, Problem, show, usePoll } from "./parts.js";

const saved = (node) => node.saved_tokens + node.children.reduce((sum, child) => sum + saved(child), 0);

export function Prefixes() {
  const [minutes, setMinutes] = useState(15);
  const { data, problem } = usePoll(() => call(`prefixes?minutes=${minutes}`), 5, [minutes]);
  const most = data && data.tree.length ? data.tree[0].asked : 1;
  return html`<h2>Shared prefixes</h2>
    <${Problem} error=${problem} />
    <div class="row"><label>Asked in the last <select value=${minutes} onChange=${(event) => setMinutes(Number(event.target.value))}>${[5, 15, 60, 360].map((n) => html`<option value=${n}>${n} minutes</option>`)}</select></label></div>
    ${data ? html`<${Figures} figures=${[
      ["requests", show(data.requests)],
      ["of them with a shared prefix", show(data.tree.reduce((sum, node) => sum + node.asked, 0))],
      ["prefill saved", show(data.tree.reduce((sum, node) => sum + saved(node), 0), "tokens")],
    ]} />` : null}
    <p class="note">${data ? `${show(data.requests)} requests with a decision; stretches that at least two of them share` : "reading …"}</p>
    ${data && data.tree.length === 0 ? html`<p class="note">No prefix is shared. Decisions come from the picker, or from routers through ReportDecision.</p>` : null}
    ${data ? html`<${Level} nodes=${data.tree} most=${most} minutes=${minutes} top />` : null}`;
}

function Level({ nodes, most, minutes, top = false }) {
  return html`<ul class=${top ? "tree top" : "tree"}>${nodes.map((node) => html`<${Stretch} key=${node.key} node=${node} most=${most} minutes=${minutes} />`)}</ul>`;
}

function Stretch({ node, most, minutes }) {
  const [open, setOpen] = useState(node.first === 0);
  const [text, setText] = useState(null);
  const pods = Object.entries(node.pods);
  const said = `${show(node.blocks)} blocks from block ${node.first}, asked ${node.asked} times, on ${pods.length} pods (${pods.slice(0, 4).map(([pod, n]) => `${pod} ${n}`).join(", ")}${pods.length > 4 ? ", …" : ""}), ${show(node.saved_tokens)} tokens of prefill saved`;
  async function read() {
    if (text) return setText(null);
    setText({ text: "reading the log …" });
    try {
      const found = await query("text", { key: node.text_key, first: node.first, since: `-${2 * minutes}m` });
      setText(found.text ? found : { text: `not shown: ${found.why}` });
    } catch (error) {
      setText({ text: `not shown: ${error.message}` });
    }
  }
  return html`<li><svg class="bar" aria-hidden="true" width=${Math.max(4, (160 * node.asked) / most)} height="11"></svg>
    ${node.children.length ? html`<button class="link" aria-expanded=${open} onClick=${() => setOpen(!open)}>${said}</button>` : said}
    ${" "}<button class="link" aria-expanded=${text !== null} onClick=${read}>text</button>
    ${text ? html`<pre class="text">${text.text}</pre>` : null}
    ${open && node.children.length ? html`<${Level} nodes=${node.children} most=${most} minutes=${minutes} />` : null}</li>`;
}
