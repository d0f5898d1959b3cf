// Search in a page that is opened from the file system, where browsers refuse workers: the worker's script runs in a
// hidden frame instead. The theme finds it by the name IFrameWorker.

if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.document.open();
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const send = (data) => inside.dispatchEvent(new MessageEvent("message", { data }));
      const waiting = []; // what arrives before the script has run
      this.postMessage = (data) => waiting.push(data);
      inside.addEventListener("load", () => {
        waiting.forEach(send);
        this.postMessage = send;
      });
      inside.document.write(`<!doctype html><body><script src="${url}"></scr` + "ipt></body>");
      inside.document.close();
    }
  };
  window.Worker = window.IFrameWorker;
}
