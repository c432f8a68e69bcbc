// Follows a run whose page is written again while it grows. The page loads itself into a frame, which hands its data over, so what
// is chosen and where it is scrolled stays. A file needs no server for that.

const HAND_OVER = "#hand-over";

function handOver(content) {
  parent.postMessage({blockroll: content}, "*");
}

class Live {
  constructor(run, take) {
    this.on = run.live !== null;
    this.seconds = run.live;
    this.made = run.made;
    this.take = take;
    this.waiting = null;
    $("live").hidden = !this.on;
    $("live").addEventListener("click", () => this.toggle());
    addEventListener("message", (event) => this.receive(event));
    this.plan();
  }

  plan() {
    clearTimeout(this.waiting);
    if (this.on) this.waiting = setTimeout(() => this.look(), 1000 * this.seconds);
  }

  toggle() {
    if (this.seconds === null) return;
    this.on = !this.on;
    $("live").setAttribute("aria-pressed", this.on);
    $("live").textContent = this.on ? "Live" : "Paused";
    this.plan();
  }

  look() {
    if (document.hidden) return this.plan();
    this.frame?.remove();
    this.frame = element("iframe", {hidden: true, title: "newer data", src: location.href.split("#")[0] + HAND_OVER});
    document.body.append(this.frame);
    this.plan();
  }

  receive(event) {
    if (!this.frame || event.source !== this.frame.contentWindow || !event.data?.blockroll) return;
    this.frame.remove();
    this.frame = null;
    const content = event.data.blockroll;
    if (content.made > this.made) {
      this.made = content.made;
      this.take(new Run(content));
    }
    this.seconds = content.live;
    if (content.live === null) { this.on = false; $("live").hidden = true; }
    this.plan();
  }
}
