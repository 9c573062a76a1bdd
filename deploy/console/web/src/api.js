// Requests to the server: the token comes from the address once and stays in this tab.
const kept = window.sessionStorage;
let asked = new AbortController();

// What the view that is left still waits for is not wanted any more.
export function abandon() {
  asked.abort();
  asked = new AbortController();
}

export function takeToken() {
  const given = new URLSearchParams(window.location.hash.slice(1)).get("token");
  if (given) {
    kept.setItem("token", given);
    window.history.replaceState(null, "", window.location.pathname + "#fleet");
  }
}

export const hasToken = (name) => Boolean(kept.getItem(name));

export function setToken(name, value) {
  value ? kept.setItem(name, value) : kept.removeItem(name);
}

export async function call(path, body) {
  const headers = {};
  if (kept.getItem("token")) headers.authorization = `Bearer ${kept.getItem("token")}`;
  if (kept.getItem("scorer")) headers["x-scorer-token"] = kept.getItem("scorer");
  if (kept.getItem("salt")) headers["x-cache-salt"] = kept.getItem("salt");
  let answer;
  let told;
  try {
    const { signal } = asked;
    answer = await fetch(`api/${path}`, body === undefined ? { headers, signal } : { method: "POST", headers, signal, body: JSON.stringify(body) });
  } catch {
    throw new Error("the console does not answer");
  }
  try {
    told = await answer.json();
  } catch {
    told = { error: `the console answered ${answer.status}` };
  }
  if (!answer.ok) {
    const error = new Error(told.error || `the console answered ${answer.status}`);
    error.status = answer.status;
    throw error;
  }
  return told;
}

export const query = (path, fields) => call(`${path}?${new URLSearchParams(fields)}`);
