// Segment what one click on a photo means, with a Core ML artifact of edgekd. Reviewed, not run.  macOS 14: swiftc -parse-as-library CoreMLClick.swift
//
//     ./CoreMLClick ARTIFACT PHOTO X,Y      prints {"iou": ..., "share": ...} of the mask over the square that the photo was fitted to
import CoreGraphics
import CoreML
import Foundation
import ImageIO

func filled(_ shape: [Int], _ value: (Int) -> Float) throws -> MLMultiArray {
    let array = try MLMultiArray(shape: shape as [NSNumber], dataType: .float32)
    array.withUnsafeMutableBufferPointer(ofType: Float.self) { to, _ in for i in 0..<to.count { to[i] = value(i) } }
    return array
}

func model(_ artifact: URL, _ name: String) async throws -> MLModel {
    try MLModel(contentsOf: try await MLModel.compileModel(at: artifact.appendingPathComponent("\(name).mlpackage")))
}

struct Preprocess: Decodable { let image_size: Int, mean: [Float], std: [Float], prompt_size: Int?, pad: String }
struct Manifest: Decodable { let preprocess: Preprocess }

@main struct Click {
    static func main() async throws {
        let arguments = CommandLine.arguments
        let artifact = URL(fileURLWithPath: arguments[1]), click = arguments[3].split(separator: ",").map { Float($0)! }
        let spec = try JSONDecoder().decode(Manifest.self, from: Data(contentsOf: artifact.appendingPathComponent("manifest.json"))).preprocess
        let size = spec.image_size, side = spec.prompt_size ?? size  // of the squares that photos, and points and masks, are in
        let source = CGImageSourceCreateWithURL(URL(fileURLWithPath: arguments[2]) as CFURL, nil)!
        let photo = CGImageSourceCreateImageAtIndex(source, 0, nil)!  // turn it by its EXIF orientation where it has one

        let longest = Float(max(photo.width, photo.height)), stretched = spec.pad == "stretch"
        func inside(_ n: Int, _ square: Int) -> Int { stretched ? square : max(1, Int(Float(n) * Float(square) / longest + 0.5)) }
        let width = inside(photo.width, size), height = inside(photo.height, size)
        var pixels = [UInt8](repeating: 0, count: width * height * 4)
        let context = CGContext(data: &pixels, width: width, height: height, bitsPerComponent: 8, bytesPerRow: width * 4,
                                space: CGColorSpace(name: CGColorSpace.sRGB)!, bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)!
        context.interpolationQuality = .medium
        context.draw(photo, in: CGRect(x: 0, y: 0, width: width, height: height))
        let images = try filled([1, 3, size, size]) { i in  // planes of RGB, normalised, zeros right and below
            let channel = i / (size * size), y = i / size % size, x = i % size
            return x < width && y < height ? (Float(pixels[(y * width + x) * 4 + channel]) - spec.mean[channel]) / spec.std[channel] : 0
        }
        let seen = try await model(artifact, "encoder").prediction(from: MLDictionaryFeatureProvider(dictionary: ["images": images]))
        let point = [click[0] * Float(inside(photo.width, side)) / Float(photo.width) - 0.5, click[1] * Float(inside(photo.height, side)) / Float(photo.height) - 0.5]
        let prompt = try MLDictionaryFeatureProvider(dictionary: [  // one prompt of one point; label 1: in the object
            "image_embeddings": seen.featureValue(for: "image_embeddings")!.multiArrayValue!, "point_coords": filled([1, 1, 2]) { point[$0] },
            "point_labels": filled([1, 1]) { _ in 1 }, "mask_input": filled([1, 1, side / 4, side / 4]) { _ in 0 }, "has_mask": filled([1]) { _ in 0 }])
        let found = try await model(artifact, "decoder").prediction(from: prompt)
        let masks = found.featureValue(for: "masks")!.multiArrayValue!, iou = found.featureValue(for: "iou")!.multiArrayValue!
        let quarter = side / 4  // masks (1, 4, F/4, F/4) are logits; the first is the answer to a click, the others are other readings of it
        let object = (0..<quarter * quarter).filter { masks[[0, 0, NSNumber(value: $0 / quarter), NSNumber(value: $0 % quarter)]].floatValue > 0 }
        print("{\"iou\": \(iou[[0, 0]]), \"share\": \(Float(object.count) / Float(quarter * quarter))}")
    }
}
