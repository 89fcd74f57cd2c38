"""Track a video with an exported model.onnx, NumPy, OpenCV and onnxruntime; nothing of LoRAT's.

python infra/track_onnx.py export/model.onnx video.mp4 X1 Y1 X2 Y2 > boxes.csv
"""

import json
import math
import sys

import cv2
import numpy as np
import onnxruntime


def crop(frame, box, area_factor, size, fill):
    """Return the square crop around a box, (size, size, 3), and scale and shift to its pixels."""
    x1, y1, x2, y2 = box
    context = (area_factor - 1) * (x2 - x1 + y2 - y1) / 2
    scale = size / math.sqrt((x2 - x1 + context) * (y2 - y1 + context))
    shift = size / 2 - scale * np.array([x1 + x2, y1 + y2]) / 2
    limits = np.array([frame.shape[1], frame.shape[0]])
    first, last = np.clip([shift, limits * scale + shift], 0, size)  # the frame in the crop
    first, last = np.floor(first).astype(int), np.floor(last + 1 - 1e-4).astype(int)
    start = np.maximum(np.floor((first - shift) / scale), 0).astype(int)  # the same in the frame
    end = np.minimum(np.floor((last - shift) / scale + 1 - 1e-4), limits).astype(int)
    image = np.full((size, size, 3), fill, np.float32)
    patch = frame[start[1] : end[1], start[0] : end[0]].astype(np.float32)
    resized = cv2.resize(patch, tuple(int(side) for side in last - first))
    image[first[1] : last[1], first[0] : last[0]] = resized
    scale_xy = (last - first) / (end - start)  # as rounded to whole pixels
    return image, scale_xy, first - start * scale_xy


def main(model, video, *box):
    """Print one line per frame: x1, y1, x2, y2, score."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["lorat"])
    template, search, stride = about["template"], about["search"], about["patch_size"]
    mean, deviation = np.float32(about["mean"]), np.float32(about["std"])

    def tensor(image):
        return (((image / 255) - mean) / deviation).transpose(2, 0, 1)[None].astype(np.float32)

    capture, box = cv2.VideoCapture(video), np.array(box, float)
    fill, feed, window = None, {}, np.hanning(search["size"] // stride)
    while (read := capture.read())[0]:
        frame, score = read[1][:, :, ::-1], 1.0  # RGB
        if fill is None:
            fill = frame.mean((0, 1))
            image, scale, shift = crop(frame, box, template["area_factor"], template["size"], fill)
            corners = (np.clip(box * [*scale, *scale] + [*shift, *shift], 0, len(image))) / stride
            left, top = np.floor(corners[:2]).astype(int)
            right, bottom = np.floor(corners[2:] + 1 - 1e-4).astype(int)
            mask = np.zeros((1, template["size"] // stride, template["size"] // stride), np.int64)
            mask[0, top:bottom, left:right] = 1
            feed, found = {"template": tensor(image), "foreground_mask": mask}, box
        else:
            grow = np.maximum(about["min_object_size"] - (box[2:] - box[:2]), 0) / 2
            around = box + np.concatenate([-grow, grow])
            image, scale, shift = crop(frame, around, search["area_factor"], search["size"], fill)
            logits, boxes = session.run(["score_map", "boxes"], feed | {"search": tensor(image)})
            scores, weight = 1 / (1 + np.exp(-logits[0])), about["window_penalty"]
            best = (scores * (1 - weight) + np.outer(window, window) * weight).argmax()
            found = boxes[0].reshape(-1, 4)[best] * search["size"]
            found = (found - [*shift, *shift]) / [*scale, *scale]
            found = np.clip(found, 0, [*frame.shape[1::-1], *frame.shape[1::-1]])
            score = scores.ravel()[best]
            if (found[2:] > found[:2]).all():  # an empty box is reported, not followed
                box = found
        print(",".join(f"{value:.3f}" for value in (*found, score)))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(float, sys.argv[3:7]))
