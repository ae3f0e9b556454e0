// Shows the title of a mark at once, on hover and on tap; the page reads as well without.
const hint = document.getElementById("hint");
const show = (event) => {
  const mark = event.target.closest(".mark");
  const title = mark && mark.querySelector("title, desc");
  hint.hidden = !title;
  if (!title) return;
  hint.textContent = title.textContent;
  const place = mark.getBoundingClientRect();
  const left = place.left + place.width / 2 - hint.offsetWidth / 2;
  const above = place.top - hint.offsetHeight - 8;
  hint.style.left = Math.max(4, Math.min(left, innerWidth - hint.offsetWidth - 4)) + "px";
  hint.style.top = (above > 4 ? above : place.bottom + 8) + "px";
};
hint.hidden = true;
document.addEventListener("pointerover", show);
document.addEventListener("pointerdown", show);
addEventListener("scroll", () => { hint.hidden = true; }, { passive: true, capture: true });
