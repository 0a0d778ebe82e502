#!/usr/bin/env bash
# What `make demo` runs: a trained checkpoint, its bundles, and videos, all in demo/. Takes the folder
# of lcexport's programs, and the log of installing TensorRT for RTX, where that failed.
set -euo pipefail
bin=$1 rtx_log=$2
graphs=(--res toy --task t2v,i2v,vc --cond-frames 5)
# Combinations of colour, shape and direction that the training never saw.
prompts=(
    "a large red circle moves left slowly on a black background"
    "a large blue square moves up slowly on a gray background"
    "a large yellow square moves right quickly on a brown background"
    "a large green triangle moves right slowly on a black background"
    "a small white triangle moves down quickly on a brown background"
    "a large purple circle moves up quickly on a gray background"
)
last_frame="
from PIL import Image
from lcexport.runtime.media import read_video
Image.fromarray(read_video('demo/1.mp4')[0][-1]).save('demo/image.png')"

rm -rf demo
mkdir demo

echo "1/5 a small trained checkpoint"
"$bin/lcexport" demo-checkpoint demo/checkpoint

echo "2/5 from the checkpoint to a bundle for text, images and continuation"
"$bin/lcexport" build --model demo/checkpoint "${graphs[@]}" -o demo/bundle

echo "3/5 the bundle against its golden outputs"
"$bin/lcexport" verify demo/bundle

echo "4/5 videos: from six prompts, from the last frame of one, and on from the end of it"
rows=()
for i in "${!prompts[@]}"; do
    "$bin/lcexport" generate demo/bundle --prompt "${prompts[i]}" --out "demo/$((i + 1)).mp4"
    rows+=("${prompts[i]}=demo/$((i + 1)).mp4")
done
"$bin/python" -c "$last_frame"
"$bin/lcexport" generate demo/bundle --prompt "a red circle moves right slowly" \
    --res toy --image demo/image.png --out demo/image.mp4
"$bin/lcexport" generate demo/bundle --prompt "a red circle moves left slowly" \
    --res toy --video demo/1.mp4 --out demo/continuation.mp4
"$bin/lcexport" contact-sheet demo/contact-sheet.png "${rows[@]}" \
    "from the first one's last picture: a red circle moves right=demo/image.mp4" \
    "on from the first one's end: a red circle moves left=demo/continuation.mp4"

echo "5/5 the same graphs in bf16, compiled for RTX cards on this processor"
if [[ -e $rtx_log ]]; then
    echo "    skipped: tensorrt-rtx cannot be installed here, $rtx_log says why"
    rtx=skipped
else
    "$bin/lcexport" build --model demo/checkpoint "${graphs[@]}" --precision bf16 --only compile \
        --backend tensorrt-rtx -o demo/bundle-rtx
    "$bin/lcexport" inspect demo/bundle-rtx
    rtx=demo/bundle-rtx
fi

cat <<END

  checkpoint      demo/checkpoint/
  bundle          demo/bundle/
  RTX bundle      $rtx
  videos          demo/1.mp4 to 6.mp4, image.mp4, continuation.mp4
  contact sheet   demo/contact-sheet.png

Next:

  $bin/lcexport generate --demo "a green triangle moves up" --out triangle.mp4
  $bin/lcexport doctor
  $bin/lcexport inspect demo/bundle
  $bin/lcexport verify demo/bundle --level video
  $bin/lcexport plan --model demo/checkpoint --res 480p,720p --only export
END
