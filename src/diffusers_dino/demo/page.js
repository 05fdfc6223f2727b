// Zoom in step: all pictures show the same part of themselves. Nothing is asked of the server.
() => {
  const view = {zoom: 1, across: 50, down: 50}; // times; percent of the picture that stays in its place
  const field = name => document.querySelector(`#zoom [name=${name}]`);
  const pictureOf = event => event.target.closest?.(".windowed img:not(.thumbnails img)");

  const show = change => {
    Object.assign(view, change);
    view.zoom = Math.min(Math.max(view.zoom, 1), 8);
    for (const name of ["across", "down"]) view[name] = Math.min(Math.max(view[name], 0), 100);
    document.documentElement.style.setProperty("--zoom", view.zoom);
    document.documentElement.style.setProperty("--across", `${view.across}%`);
    document.documentElement.style.setProperty("--down", `${view.down}%`);
    document.documentElement.classList.toggle("zoomed", view.zoom > 1);
    for (const name in view) if (field(name)) field(name).value = view[name];
  };

  document.addEventListener("input", event => {
    if (event.target.closest("#zoom")) show({[event.target.name]: Number(event.target.value)});
  });
  document.addEventListener("wheel", event => {
    const picture = event.ctrlKey && pictureOf(event);
    if (!picture) return;
    event.preventDefault();
    const box = picture.getBoundingClientRect(); // of the picture as it is shown, enlarged
    const point = {across: 100 * (event.clientX - box.left) / box.width, down: 100 * (event.clientY - box.top) / box.height};
    const begins = view.zoom === 1;
    show({zoom: view.zoom * 2 ** (-event.deltaY / 200), ...(begins ? point : {})});
  }, {passive: false});

  const name = () => { // what Gradio leaves without a name or a role, for those who hear the page
    document.querySelectorAll(".empty[aria-label]:not([role])").forEach(place => { place.role = "img"; });
    document.querySelectorAll("button:has(> .image-frame):not([aria-label])").forEach(button => {
      button.setAttribute("aria-label", "Image");
    });
  };
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
  name();

  let moved = 0, held = null;
  document.addEventListener("pointerdown", event => {
    held = view.zoom > 1 && event.button === 0 ? pictureOf(event) : null;
    moved = 0;
  });
  document.addEventListener("pointermove", event => {
    if (!held) return;
    const spare = {across: held.offsetWidth * (view.zoom - 1), down: held.offsetHeight * (view.zoom - 1)};
    moved += Math.abs(event.movementX) + Math.abs(event.movementY);
    show({across: view.across - 100 * event.movementX / spare.across, down: view.down - 100 * event.movementY / spare.down});
  });
  document.addEventListener("pointerup", () => { held = null; });
  document.addEventListener("dragstart", event => { if (view.zoom > 1 && pictureOf(event)) event.preventDefault(); });
  document.addEventListener("click", event => { // a picture that was moved is not opened
    if (moved > 4) event.stopPropagation();
    moved = 0;
  }, true);
}
