// The page: one view at a time, named in the address.
import { html, render } from "htm/preact";
import { useEffect, useState } from "preact/hooks";
import { abandon, call, hasToken, setToken, takeToken } from "./api.js";
import { Ask } from "./ask.js";
import { Decisions } from "./decisions.js";
import { Fleet } from "./fleet.js";
import { Flow } from "./flow.js";
import { Prefixes } from "./prefixes.js";
import { WhatIf } from "./whatif.js";

const VIEWS = { fleet: ["Fleet", Fleet], prefixes: ["Prefixes", Prefixes], ask: ["Ask", Ask], decisions: ["Decisions", Decisions], flow: ["Flow", Flow], "what-if": ["What if", WhatIf] };

function App() {
  const named = () => (window.location.hash.slice(1) in VIEWS ? window.location.hash.slice(1) : "fleet");
  const [view, setView] = useState(named());
  const [locked, setLocked] = useState(false);
  useEffect(() => {
    const moved = () => {
      if (document.getElementById("main")) abandon(); // not while it is locked: then the token is being tried
      setView(named());
      document.getElementById("main")?.focus(); // what is new is read next
    };
    window.addEventListener("hashchange", moved);
    call("picture").catch((error) => setLocked(error.status === 401));
    return () => window.removeEventListener("hashchange", moved);
  }, []);
  useEffect(() => {
    document.title = `${VIEWS[view][0]} – kvatlas`;
  }, [view]);
  if (locked) return html`<${Unlock} done=${() => setLocked(false)} />`;
  return html`<header><h1>kvatlas</h1><nav aria-label="Views">${Object.entries(VIEWS).map(([name, [title]]) => html`<a href=${`#${name}`} aria-current=${name === view ? "page" : null}>${title}</a>`)}</nav><${Access} /></header>
    <main id="main" tabindex="-1">${html`<${VIEWS[view][1]} key=${view} />`}</main>`;
}

function Access() {
  return html`<details class="access"><summary>Access</summary><form onSubmit=${(event) => event.preventDefault()}>
    <label>Scorer token <input type="password" autocomplete="off" placeholder=${hasToken("scorer") ? "set" : ""} onInput=${(event) => setToken("scorer", event.target.value)} /><small>where the scorer asks for one: what you see is what it may</small></label>
    <label>Cache salt <input autocomplete="off" placeholder=${hasToken("salt") ? "set" : ""} onInput=${(event) => setToken("salt", event.target.value)} /><small>of a tenant, whose requests are then shown alone</small></label>
  </form></details>`;
}

function Unlock({ done }) {
  const [problem, setProblem] = useState("");
  async function open(event) {
    event.preventDefault();
    setToken("token", new FormData(event.target).get("token"));
    try {
      await call("picture");
      done();
    } catch (error) {
      setProblem(error.message);
    }
  }
  return html`<main><h1>kvatlas</h1><form onSubmit=${open}><label>Token <input name="token" type="password" autocomplete="off" required /><small>as printed by kvatlas console, or from its token file</small></label><button class="do">Open</button></form>${problem ? html`<p class="problem" role="alert">${problem}</p>` : null}</main>`;
}

takeToken();
const place = document.getElementById("app");
place.replaceChildren();
render(html`<${App} />`, place);
